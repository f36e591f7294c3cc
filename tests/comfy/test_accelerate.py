"""Accelerate AR-VDM: the clip of a run without it, and what the run says."""

from pathlib import Path

import pytest
import torch
from comfy_graphs import node, small
from comfy_server import Server, find_comfyui
from standalone_runs import execute

from autorefiner.nodes.accelerated import noting
from autorefiner.refiner.acceleration import Acceleration
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.schedule import PRESETS

from tiny import TINY


def graph_of(compile: bool, graphs: str = "auto") -> dict:
    """Return text_to_video of 21 frames, accelerated."""
    graph = small("text_to_video")
    graph["3"]["inputs"] |= {"length": 21, "seed": 5}
    model = graph["3"]["inputs"]["model"]
    accelerate = node("AutoRefinerAccelerate", model=model, compile=compile, graphs=graphs)
    graph["50"] = accelerate
    graph["3"]["inputs"]["model"] = ["50", 0]
    return graph


@pytest.mark.parametrize("compile", [True, False])
def test_an_accelerated_workflow_makes_the_same_clip(
    compile: bool, base: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    plain = graph_of(compile)
    plain["3"]["inputs"]["model"] = plain.pop("50")["inputs"]["model"]
    expected = execute(plain, base)["3"][0]["samples"]
    assert "compiling" not in capsys.readouterr().err
    clip = execute(graph_of(compile), base)["3"][0]["samples"]
    torch.testing.assert_close(clip, expected)
    told = capsys.readouterr().err
    assert "graphs do nothing on cpu" in told
    assert ("were compiling" in told) == compile


def test_a_run_that_cannot_compile_says_so(base: Path, monkeypatch, capsys) -> None:
    def uncompiled(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda function, **_: uncompiled)
    graph = graph_of(compile=True, graphs="off")
    with pytest.warns(UserWarning, match="no compiler here"):
        execute(graph, base)
    assert "no compiler here" in capsys.readouterr().err


def test_every_run_of_a_model_that_cannot_compile_says_so() -> None:
    acceleration, told = Acceleration(compile=True), []
    memory = RunPlan(PRESETS["self-forcing"], 3, 4, 4).memory(TINY, torch.float32)
    acceleration.compiler.failure = "as before"
    with noting(acceleration, memory, torch.device("cpu"), told.append):
        pass
    assert told == ["as before"]


@pytest.mark.comfyui
@pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")
def test_comfyui_accelerates_its_model(server: Server) -> None:
    """Without compiling, which takes longer than the rest of this file."""
    texts = server.run(graph_of(compile=False))["outputs"]["3"]["text"]
    assert any("graphs do nothing on cpu" in text for text in texts)
