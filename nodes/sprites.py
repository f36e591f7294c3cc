"""What both hosts know of the bundled sprites."""

from pathlib import Path

from ..refiner.demo import bundle
from ..refiner.demo.captions import unknown_words
from ..refiner.wan.checkpoint import inspect


def sprite_file(name: str) -> Path:
    """A file of the bundle."""
    return bundle.WEIGHTS / bundle.FILES[name]


def sprite_preset() -> str | None:
    """The preset that the bundled model says it is sampled with."""
    return inspect(sprite_file("student")).preset


def unknown_told(text: str) -> str | None:
    """One line on the words of a prompt that the sprites do not know, if there are any."""
    unknown = unknown_words(text)
    return f"the sprites do not know {', '.join(map(repr, unknown[:5]))}" if unknown else None
