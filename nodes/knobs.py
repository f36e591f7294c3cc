"""Knobs of a sampler node's method and noise: inputs, and the texts that name them to the core."""

from collections.abc import Iterable

from ..refiner.choices import choose
from ..refiner.noise.sources import NOISES
from ..refiner.samplers import SAMPLERS
from .api import io
from .options import check_settings
from .run import WHITE
from .search import METHODS


def method_inputs() -> list:
    """Return the input of both sampler nodes for the method's knobs."""
    return [
        io.String.Input(
            "method_settings", default="", optional=True, advanced=True,
            tooltip="The method's knobs, like threshold=0.2 for self-refine or below=600 for ttc."
            " Empty: its defaults. The searches have candidates instead.",
        ),
    ]  # fmt: skip


def noise_inputs() -> list:
    """Return the inputs of a sampler node that draws the noise itself."""
    return [
        io.Combo.Input(
            "noise", options=list(NOISES), default=WHITE, optional=True, advanced=True,
            tooltip="white: independent in every element, as the models are trained. The others"
            " correlate the frames of the initial noise; the help page describes them.",
        ),
        io.String.Input(
            "noise_settings", default="", optional=True, advanced=True,
            tooltip="The noise's knobs, like rho=0.2 for antiphase; path=1 shapes the noise between"
            " levels, too. Empty: its defaults.",
        ),
    ]  # fmt: skip


def named(kind: str, name: str, settings: str, names: Iterable[str]) -> str:
    """Return a widget's choice with its knobs, as `choose` reads it; ValueError lists the names."""
    check_settings(settings, f"{kind}_settings")
    if name not in (known := tuple(names)):
        raise ValueError(f"{kind} {str(name)[:40]!r} is not known: use one of {', '.join(known)}")
    return f"{name}:{settings.strip()}" if settings.strip() else name


def method_text(method: str, settings: str) -> str:
    """Return the method with its knobs, like ttc:below=600.

    Raises ValueError for a name or a knob that there is not, and for knobs of a search.
    """
    text = named("method", method, settings, METHODS)
    if method in SAMPLERS:
        choose(text, SAMPLERS, "method")
    elif text != method:
        raise ValueError(
            f"method_settings {settings!r} with {method}, whose knob is the input candidates: leave"
            " them empty"
        )
    return text


def noise_text(noise: str, settings: str) -> str:
    """Return the noise with its knobs, like antiphase:rho=0.2; ValueError if it has them not."""
    text = named("noise", noise, settings, NOISES)
    choose(text, NOISES, "noise")
    return text


def check_knobs(
    method: str | None,
    method_settings: str | None,
    noise: str | None = None,
    noise_settings: str | None = None,
) -> None:
    """Raise ValueError for knobs that cannot be; None is a link, checked when it is known."""
    if method is not None:
        method_text(method, method_settings or "")
    if noise is not None:
        noise_text(noise, noise_settings or "")
