"""Prompt timelines and memory policies in a real ComfyUI."""

import pytest
import torch
from comfy_graphs import node
from comfy_runs import NEAR, alone, custom, sampled, short
from comfy_server import Refused, Server, find_comfyui

from autorefiner.refiner.memory.policies import POLICIES
from autorefiner.refiner.memory.stores import STORES

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.usefixtures("stand_ins"),
]
STAR = "a red star circles on a navy ground"
WIDGETS = {
    "window": -1, "sink": 0, "positions": "the model's", "history": "as trained",
    "previous_x0": "as trained",
}  # fmt: skip


def scenes(graph: dict, text: str) -> dict:
    """Give a graph a Prompt Timeline in place of its prompt."""
    graph["2"] = node("AutoRefinerPromptTimeline", clip=graph["2"]["inputs"]["clip"], text=text)
    return graph


def remembering(**chosen: object) -> dict:
    """Return a graph of 9 latent frames with these inputs of a Reflective Cache."""
    graph = short(33)
    graph["60"] = node("AutoRefinerReflectiveCache", **WIDGETS | chosen)
    graph["3"]["inputs"]["reflective_cache"] = ["60", 0]
    return graph


def test_a_timeline_samples_what_it_does_without_comfyui(server: Server) -> None:
    graph = scenes(short(45), f"0s {STAR}\nf10 recache 3: a green box\nf22 flush 1: a blue ring")
    latents = sampled(server, graph, "scenes")
    torch.testing.assert_close(latents, alone(server, graph), **NEAR)
    plain = sampled(server, short(45), "one_scene")
    torch.testing.assert_close(latents[:, :, :6], plain[:, :, :6], **NEAR)
    assert not torch.allclose(latents[:, :, 6:], plain[:, :, 6:], **NEAR)


def test_the_custom_sampler_follows_a_timeline(server: Server) -> None:
    text = custom()["2"]["inputs"]["text"]
    plain = sampled(server, custom(), "plain", "9")
    alike = sampled(server, scenes(custom(), text), "alike", "9")
    switched = sampled(server, scenes(custom(), f"0s {text}\nf10 keep: a green box"), "switch", "9")
    torch.testing.assert_close(alike, plain, **NEAR)
    torch.testing.assert_close(switched[:, :, :6], plain[:, :, :6], **NEAR)
    assert not torch.allclose(switched[:, :, 6:], plain[:, :, 6:], **NEAR)


@pytest.mark.parametrize(
    "chosen", [*({"memory": name} for name in POLICIES), *({"store": name} for name in STORES)],
    ids=lambda chosen: "-".join(chosen.values()),
)  # fmt: skip
def test_policies_and_stores_sample_what_they_do_without_comfyui(
    chosen: dict, server: Server
) -> None:
    graph = remembering(**chosen)
    torch.testing.assert_close(sampled(server, graph, "memory"), alone(server, graph), **NEAR)


@pytest.mark.parametrize(
    ("key", "graph", "word"),
    [
        ("2", scenes(short(), "0s a star\n80 a box"), "is no time"),
        ("60", remembering(memory="top-frames", memory_settings="frames=2"), "knob"),
        ("60", remembering(positions="flex", positions_settings="scale=2"), "scale"),
        ("60", remembering(memory="no-such"), "no-such"),
    ],
    ids=["text", "memory_settings", "positions_settings", "memory"],
)
def test_bad_text_is_an_error_of_the_node_before_the_prompt_is_queued(
    key: str, graph: dict, word: str, server: Server
) -> None:
    with pytest.raises(Refused) as refused:
        server.queue(graph)
    assert word in refused.value.answer["node_errors"][key]["errors"][0]["details"]


def test_a_timeline_beside_another_prompt_is_an_error(server: Server) -> None:
    graph = scenes(short(), f"0s {STAR}\nf10 keep: a green box")
    combined = {"conditioning_1": ["2", 0], "conditioning_2": ["2", 0]}
    graph["60"] = node("ConditioningCombine", **combined)
    graph["3"]["inputs"]["positive"] = ["60", 0]
    assert "Prompt Timeline" in server.error(graph)["exception_message"]
