"""SamplerCustomAdvanced, searches and knobs in a real ComfyUI."""

import pytest
import torch
from comfy_graphs import node, training
from comfy_runs import NEAR, alone, custom, latents, sampled, short
from comfy_server import Refused, Server, find_comfyui

from autorefiner.refiner.samplers import SEARCHES

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.usefixtures("stand_ins"),
]


def test_without_a_refiner_it_equals_comfyuis_own_sampler(server: Server) -> None:
    ours = sampled(server, custom(fresh_noise="as SamplerARVideo"), "ours", "9")
    graph = custom()
    graph["8"] = node("SamplerARVideo", num_frame_per_block=3)
    core = sampled(server, graph, "core", "9")
    assert ours.shape == core.shape == (1, 16, 8, 8, 8)
    assert (ours - core).abs().max() < 1e-4
    assert not torch.allclose(sampled(server, custom(), "fresh", "9"), core)


def test_knobs_and_noise_sample_what_they_do_without_comfyui(server: Server) -> None:
    chosen = {"method": "self-refine", "method_settings": "750=3", "noise": "ar"}
    graph = short(seed=9, **chosen, noise_settings="b=0.3")
    made = sampled(server, graph, "knobs")
    torch.testing.assert_close(made, alone(server, graph), **NEAR)
    for name in ("method_settings", "noise"):
        plain = short(seed=9, **{**chosen, name: {"noise": "white"}.get(name, "")})
        assert not torch.allclose(made, sampled(server, plain, f"no_{name}"))


def test_knobs_reach_the_custom_sampler(server: Server) -> None:
    none = custom(method="self-refine", method_settings="750=0,500=0")
    plain = sampled(server, custom(), "plain", "9")
    assert torch.equal(sampled(server, none, "none", "9"), plain)
    assert not torch.equal(sampled(server, custom(method="self-refine"), "some", "9"), plain)


@pytest.mark.parametrize(
    ("graph", "word"),
    [
        (short(method="ttc", method_settings="threshold=1"), "knob"),
        (short(noise="pink"), "pink"),
        (short(method="no-such"), "no-such"),
        (custom(method_settings="candidates=3"), "knob"),
    ],
)
def test_knobs_that_there_are_not_are_refused_when_the_prompt_is_queued(
    graph: dict, word: str, server: Server
) -> None:
    with pytest.raises(Refused, match=word):
        server.queue(graph)


def with_reward(graph: dict, key: str, method: str) -> dict:
    """Add the bundled reward and a search method to the sampler node `key`."""
    graph["40"] = node(
        "AutoRefinerLoadReward", kind="sprites", model="bundled", weight=1.0, frames=0, interval=0
    )
    search = {"reward": ["40", 0], "vae": ["1", 2], "prompt": "a red star", "candidates": 2}
    graph[key]["inputs"] |= {"method": method, **search}
    return graph


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_chooses_what_it_does_without_comfyui(method: str, server: Server) -> None:
    graph = with_reward(short(13, seed=9, batch_size=2), "3", method)
    made = sampled(server, graph, method)
    torch.testing.assert_close(made, alone(server, graph), **NEAR)
    assert not torch.allclose(made, sampled(server, short(13, seed=9, batch_size=2), "no_search"))


def test_the_custom_sampler_searches_and_a_training_goes_through_the_reward_behind_it(
    server: Server, peft_inside: None
) -> None:
    graph = with_reward(custom(), "8", "best-of-n")
    assert not torch.allclose(
        sampled(server, graph, "searched", "9"), sampled(server, custom(), "unsearched", "9")
    )
    learnt = training(
        run="searched",
        objective="reward",
        reward=["40", 0],
        teacher=None,
        steps=1,
        width=64,
        height=64,
    )
    server.run({"40": graph["40"], **learnt})  # the cached REWARD


def test_what_the_custom_sampler_calls_denoised_is_the_clip(server: Server) -> None:
    graph = custom()
    graph["91"] = node("SaveLatent", samples=["9", 1], filename_prefix="latents/denoised")
    torch.testing.assert_close(sampled(server, graph, "output", "9"), latents(server, "denoised"))
