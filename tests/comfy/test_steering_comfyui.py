"""Recipes, held chunks, start images and start videos in a real ComfyUI."""

import pytest
import torch
from comfy_graphs import node
from comfy_runs import NEAR, alone, custom, sampled, short
from comfy_server import Refused, Server, find_comfyui

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.usefixtures("stand_ins"),
]
LENGTH = 45  # 12 latent frames in 4 chunks


def reused(server: Server, graph: dict, key: str) -> list[bool]:
    """Run a graph; return for each chunk of node `key` whether it is an earlier run's."""
    workflow = {"id": "steered"}
    prompt = server.queue(graph, extra_pnginfo={"workflow": workflow})
    assert server.wait(prompt)["status"]["status_str"] == "success"
    runs = server.post("/autorefiner/runs", {"workflow": "steered", "nodes": [key]})["runs"]
    assert runs[key]["prompt"] == prompt
    return [tile.get("reused", False) for tile in runs[key]["tiles"]]


def test_a_rerolled_chunk_equals_a_headless_run_of_the_recipe(server: Server) -> None:
    first = sampled(server, short(LENGTH, seed=21), "first")
    graph = short(LENGTH, seed=21, recipe="reroll 2")
    rerolled = sampled(server, graph, "rerolled")
    assert torch.equal(rerolled[:, :, :3], first[:, :, :3])
    assert (rerolled[:, :, 3:6] - first[:, :, 3:6]).abs().max() > 1e-2
    torch.testing.assert_close(rerolled, alone(server, graph), **NEAR)


def test_reused_chunks_give_what_a_run_of_the_whole_recipe_gives(server: Server) -> None:
    """Bit for bit: another batch size holds no chunk of these."""
    recipe = "reroll 3; extend 1; keep 4; reroll 4 2"
    steps = ["", "reroll 3", "reroll 3; extend 1", recipe]
    clips = [sampled(server, short(LENGTH, seed=22, recipe=text), "steps") for text in steps]
    anew = short(LENGTH, seed=22, recipe=recipe)
    anew["1"]["inputs"]["network"] = "student"
    anew["50"] = node("ModelSamplingSD3", model=["1", 0], shift=5.0)  # another MODEL, the same
    anew["3"]["inputs"]["model"] = ["50", 0]
    assert torch.equal(clips[-1], sampled(server, anew, "anew"))
    assert [clip.shape[2] for clip in clips] == [12, 12, 15, 12]


@pytest.mark.parametrize("key", ["3", "8"], ids=["sampler", "custom"])
def test_only_the_chunks_that_a_recipe_changes_are_sampled(key: str, server: Server) -> None:
    graph = short(LENGTH, seed=31) if key == "3" else custom()
    whole = reused(server, graph, key)
    assert not any(whole)
    graph[key]["inputs"]["recipe"] = "reroll 2"
    assert reused(server, graph, key) == [True] + [False] * (len(whole) - 1)
    graph[key]["inputs"]["recipe"] = "reroll 3"
    assert reused(server, graph, key) == [True, True] + [False] * (len(whole) - 2)
    graph["2"]["inputs"]["text"] = "a blue box"
    assert not any(reused(server, graph, key))


@pytest.mark.parametrize("key", ["3", "8"], ids=["sampler", "custom"])
def test_a_run_of_held_chunks_alone_samples_nothing(key: str, server: Server) -> None:
    graph = short(LENGTH, seed=32) if key == "3" else custom()
    for recipe in ("", "keep 2", "keep 3"):  # else ComfyUI has the clip itself
        graph[key]["inputs"]["recipe"] = recipe
        reused(server, graph, key)
    graph[key]["inputs"]["recipe"] = ""
    assert all(reused(server, graph, key))


def test_the_custom_sampler_follows_a_recipe(server: Server) -> None:
    first = sampled(server, custom(), "custom", "9")
    kept = sampled(server, custom(recipe="keep 2"), "custom", "9")
    again = sampled(server, custom(recipe="reroll 2; extend 1"), "custom", "9")
    assert torch.equal(kept, first[:, :, :6]) and torch.equal(again[:, :, :3], first[:, :, :3])
    assert again.shape[2] == first.shape[2] + 3
    assert (again[:, :, 3:6] - first[:, :, 3:6]).abs().max() > 1e-2


def with_video(level: int, length: int = 21) -> dict:
    """Return a graph that starts from the video of another sampler."""
    first = {
        "50": short(21, seed=25)["3"],
        "51": node("VAEDecode", samples=["50", 0], vae=["1", 2]),
    }
    video = {"start_level": level, "start_video": ["51", 0], "vae": ["1", 2]}
    return {**first, **short(length, seed=24, **video)}


def test_a_video_starts_a_clip_as_it_does_without_comfyui(server: Server) -> None:
    clips = {level: sampled(server, with_video(level), "v2v") for level in (1000, 250)}
    assert torch.equal(clips[1000], sampled(server, short(21, seed=24), "v2v"))
    torch.testing.assert_close(clips[250], alone(server, with_video(250)), **NEAR)
    assert (clips[250] - clips[1000]).abs().max() > 0.1


def test_a_video_that_is_too_short_is_refused_with_both_lengths(server: Server) -> None:
    error = server.error(with_video(500, length=33))
    assert "21" in error["exception_message"] and "33" in error["exception_message"]


def test_a_start_image_needs_no_encoding_node(server: Server) -> None:
    graph = short(21, seed=26, start=["50", 0], vae=["1", 2])
    graph["50"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x336699)
    encoded = {**graph, "51": node("VAEEncode", pixels=["50", 0], vae=["1", 2])}
    encoded["3"] = node("AutoRefinerSampler", **{**graph["3"]["inputs"], "start": ["51", 0]})
    made = sampled(server, graph, "image")
    assert torch.equal(made, sampled(server, encoded, "image"))


def test_a_recipe_that_cannot_be_read_is_refused_when_it_is_queued(server: Server) -> None:
    with pytest.raises(Refused, match="recipe"):
        server.queue(short(21, recipe="again"))
