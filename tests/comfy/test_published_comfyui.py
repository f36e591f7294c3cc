"""Published files in ComfyUI (`pytest -m comfyui`) get the same answers as without it."""

from pathlib import Path

import pytest
from comfy_server import find_comfyui

from autorefiner.nodes.load import choose_preset
from autorefiner.refiner.wan.checkpoint import inspect, load_transformer

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]


def alone(path: Path) -> dict:
    """Answer without ComfyUI what inside_published.py answers in it."""
    try:
        preset = choose_preset("auto", inspect(path))
    except ValueError as error:
        return {"error": str(error)}
    state = load_transformer(path)[0].state_dict()
    named = ("blocks.0.self_attn.q.weight", "head.head.weight")
    return {"preset": preset, "weights": [state[name].float().sum().item() for name in named]}


def test_comfyui_gives_the_same_answers(published: list[Path], inside: dict) -> None:
    for path, answer in zip(published, inside["published"], strict=True):
        expected = alone(path)
        assert (answer.get("preset"), answer.get("error")) == (
            expected.get("preset"),
            expected.get("error"),
        ), path
        if "weights" in expected:
            assert answer["weights"] == pytest.approx(expected["weights"], rel=1e-3), path
    assert sum("weights" in answer for answer in inside["published"]) >= 7
