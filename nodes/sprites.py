"""The demo's networks, as both hosts load them."""

from pathlib import Path

from ..refiner.bundles import BUNDLES, DEMO
from ..refiner.wan.checkpoint import inspect


def sprite_file(network: str) -> Path:
    """Return the file of the demo's student or teacher."""
    demo = BUNDLES[DEMO]
    return demo.training.teacher if network == "teacher" else demo.model


def sprite_preset() -> str | None:
    """Return the preset that the demo's student names."""
    return inspect(sprite_file("student")).preset
