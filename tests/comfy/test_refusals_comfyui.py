"""Prompts that a real ComfyUI refuses and runs that fail: the message names node and fix."""

import json
from pathlib import Path

import pytest
import torch
from comfy_graphs import node, small
from comfy_runs import custom, short
from comfy_server import Refused, Server, find_comfyui

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]


def refusal(server: Server, graph: dict) -> str:
    """Queue a graph that must be refused; return its error messages as JSON."""
    with pytest.raises(Refused) as refused:
        server.queue(graph)
    errors = refused.value.answer["node_errors"]
    return json.dumps([[key, error] for key, found in errors.items() for error in found["errors"]])


def test_prompts_that_cannot_run_are_refused_with_what_to_do(server: Server) -> None:
    assert "17 and 21" in refusal(server, short(20))
    assert "16381" in refusal(server, short(99997))
    assert "self-refine" in refusal(server, short(method="none"))
    assert "value_bigger_than_max" in refusal(server, short(width=99999))
    graph = small("self_forcing")
    graph["1"]["inputs"]["file"] = "../../secret.pt"
    assert "value_not_in_list" in refusal(server, graph)
    graph = short()
    graph["60"] = node(
        "AutoRefinerChunkSchedule", preset="the model's", levels="500, 1000", frames_per_chunk=0,
        first_levels="", refined_levels="",
    )  # fmt: skip
    graph["3"]["inputs"]["chunk_schedule"] = ["60", 0]
    refused = refusal(server, graph)
    assert "fall" in refused and refused.count("custom_validation_failed") == 1
    assert refused.count("first_levels") == 0
    graph["60"]["inputs"] |= {"levels": "", "first_levels": "500, 1000"}
    assert "first_levels" in server.error(graph)["exception_message"]


def test_widgets_may_be_links(server: Server) -> None:
    graph = short()
    graph["60"] = node("PrimitiveInt", value=9)
    graph["61"] = node("PrimitiveString", value="1000, 500")
    graph["62"] = node(
        "AutoRefinerChunkSchedule", preset="the model's", levels=["61", 0], frames_per_chunk=0,
        first_levels="", refined_levels="",
    )  # fmt: skip
    graph["3"]["inputs"] |= {"length": ["60", 0], "chunk_schedule": ["62", 0]}
    server.run(graph)
    graph["60"]["inputs"]["value"] = 99997
    assert "16381" in server.error(graph)["exception_message"]


def failing(change: str) -> tuple[dict, str, str]:
    """Return (graph, id of the node that fails, part of its message)."""
    graph = short(9)
    if change == "size":
        graph["3"]["inputs"]["width"] = 72
        return graph, "3", "both must be multiples of 16, the nearest is 64x64"
    if change == "latent":
        graph["60"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
        graph["3"]["inputs"]["latent"] = ["60", 0]
        return graph, "3", "latent has latents of shape (1, 4, 8, 8), expected [batch, 16, frames"
    if change == "outside":
        graph["60"] = node(
            "AutoRefinerDecodeToVideo",
            samples=["3", 0],
            vae=["1", 2],
            fps=16,
            filename_prefix="../../x",
        )
        return graph, "60", "leaves"
    if change == "two":
        graph["60"] = node("ConditioningCombine", conditioning_1=["2", 0], conditioning_2=["2", 0])
        graph["3"]["inputs"]["positive"] = ["60", 0]
        return graph, "3", "positive has 2 entries: the models take one prompt"
    if change == "range":
        graph["60"] = node(
            "ConditioningSetTimestepRange", conditioning=["2", 0], start=0.5, end=1.0
        )
        graph["3"]["inputs"]["positive"] = ["60", 0]
        return (
            graph,
            "3",
            "positive has timestep_start and timestep_end: a prompt holds for all of a clip",
        )
    graph = custom()
    if change == "cfg":
        graph["5"] = node(
            "CFGGuider", model=["3", 0], positive=["2", 0], negative=["2", 0], cfg=3.0
        )
        return graph, "9", "the guider has cfg 3: AR models are distilled"
    if change == "guider":
        cfg = {"cfg_conds": 1.0, "cfg_cond2_negative": 1.0, "style": "regular"}
        graph["5"] = node(
            "DualCFGGuider",
            model=["3", 0],
            cond1=["2", 0],
            cond2=["2", 0],
            negative=["2", 0],
            **cfg,
        )
        return graph, "9", "the guider is a Guider_DualCFG, which mixes predictions"
    if change == "sigmas":
        graph["4"]["inputs"]["denoise"] = 0.5
        return graph, "9", "SIGMAS"
    graph["60"] = node(
        "AutoRefinerChunkSchedule",
        preset="causvid",
        levels="",
        frames_per_chunk=0,
        first_levels="",
        refined_levels="",
    )
    graph["8"]["inputs"]["chunk_schedule"] = ["60", 0]
    return graph, "9", "CHUNK_SCHEDULE says sigmas 1.0000, 0.7568"


@pytest.mark.parametrize(
    "change", ["size", "latent", "outside", "two", "range", "cfg", "guider", "sigmas", "schedule"]
)
def test_what_fails_while_it_runs_says_what_to_do(change: str, server: Server) -> None:
    graph, key, message = failing(change)
    error = server.error(graph)
    assert error["node_id"] == key
    assert message in error["exception_message"]
    assert not (server.base.parent / "x_00001_.mp4").exists()


def test_a_pickle_that_would_run_code_is_refused(server: Server) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (server.base / "owned",))

    torch.save(
        {"generator": Evil()}, server.base / "models" / "diffusion_models" / "self_forcing_evil.pt"
    )
    graph = small("self_forcing")
    graph["1"]["inputs"]["file"] = "self_forcing_evil.pt"
    assert "code" in server.error(graph)["exception_message"]
    assert not (server.base / "owned").exists()
