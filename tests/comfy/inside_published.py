"""Inspect published files with ComfyUI; part of inside.py."""

from pathlib import Path

from packed import host

# isort: split
from pack.nodes.hosts.comfy_model import network_of
from pack.nodes.load import choose_preset
from pack.refiner.wan.checkpoint import inspect

NAMED = ("blocks.0.self_attn.q.weight", "head.head.weight")


def answer(path: Path) -> dict:
    """Return the preset and sums of a few weights, or the error message."""
    try:
        preset = choose_preset("auto", inspect(path))
        model = host.load_model(path, preset, "fp32", "auto")
    except ValueError as error:
        return {"error": str(error)}
    network = network_of(model)
    return {
        "preset": preset,
        "weights": [network.get_parameter(name).float().sum().item() for name in NAMED],
    }
