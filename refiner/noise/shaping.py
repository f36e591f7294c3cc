"""Shaped noise: white noise with correlations between frames, each element still N(0, 1)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..schedule import Chunk
from .source import Draw, NoiseSource

# from white noise and the latent frames a chunk to a source
Shaping = Callable[[NoiseSource, int], NoiseSource]


def shaping(make: Shaping, path: int) -> Shaping:
    """Shape the initial noise of chunks only, and with `path` 1 that between levels, too."""
    if path not in (0, 1):
        raise ValueError(f"noise, path {path}: give 0 (initial noise only) or 1 (every level)")
    if path:
        return make
    return lambda white, frames: InitialNoise(make(white, frames), white)


def white() -> Shaping:
    """Leave the noise white: independent in every element."""
    return lambda white, frames: white


@dataclass(frozen=True, slots=True)
class InitialNoise:
    """Draw the noise of a chunk's first level from one source, all other from `later`."""

    initial: NoiseSource
    later: NoiseSource

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        source = self.initial if draw.step == chunk.levels[0].step else self.later
        return source(chunk, draw, shape)


def chunk_before(chunk: Chunk, index: int, frames: int) -> Chunk:
    """Return the chunk of this index in a run with `chunk`, which is not before it.

    Every chunk has `frames` latent frames, but the first and the last of a run may be shorter.
    """
    if index == chunk.index:
        return chunk
    start = chunk.start - (chunk.index - index) * frames
    if index == 0:
        return replace(chunk, index=0, start=0, length=start + frames)
    return replace(chunk, index=index, start=start, length=frames)
