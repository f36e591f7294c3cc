"""Noises by the name that users give."""

from collections.abc import Callable

from .antiphase import antiphase
from .ar import ar
from .freenoise import freenoise
from .shaping import Shaping, white

# Arguments are knobs. Each returns a function from white noise and the frames a chunk to a source.
NOISES: dict[str, Callable[..., Shaping]] = {
    "white": white,
    "freenoise": freenoise,
    "antiphase": antiphase,
    "ar": ar,
}
