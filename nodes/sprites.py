"""What both hosts know of the bundled sprites."""

from pathlib import Path

from ..refiner.demo import bundle
from ..refiner.wan.checkpoint import inspect


def sprite_file(name: str) -> Path:
    """A file of the bundle."""
    return bundle.WEIGHTS / bundle.FILES[name]


def sprite_preset() -> str | None:
    """The preset that the bundled model says it is sampled with."""
    return inspect(sprite_file("student")).preset
