"""Noise that is correlated from chunk to chunk: an autoregressive process of first order."""

from dataclasses import dataclass
from math import ceil, log

import torch
from torch import Tensor

from ..schedule import Chunk
from .shaping import Shaping, chunk_before, shaping
from .source import Draw, NoiseSource

LARGEST = 0.95
FORGOTTEN = 0.01  # share of a chunk's noise below which an earlier chunk is left out


def ar(b: float = 0.5, path: int = 0) -> Shaping:
    """Make ε_i = b ε_(i−1) + √(1 − b²) n_i for chunk i, frame by frame.

    Frames of the same rank in chunks i and j have the correlation b^|i − j|. b = 0 is white.
    """
    if not -LARGEST <= b <= LARGEST:
        raise ValueError(f"ar noise, b {b:g}: give a number from -{LARGEST} to {LARGEST}")
    return shaping(lambda white, chunk: CorrelatedNoise(white, b, chunk), path)


@dataclass(frozen=True, slots=True)
class CorrelatedNoise:
    """Compute the process for any chunk from white noise, without a state.

    It begins `depth` chunks before, with white noise, so the variance is 1 and a draw takes a
    bounded number of white ones: 8 for b = 0.5, 45 for b = 0.9.
    """

    white: NoiseSource
    b: float
    frames: int  # a chunk

    @property
    def depth(self) -> int:
        """Number of earlier chunks that a chunk's noise depends on."""
        return ceil(log(FORGOTTEN) / log(abs(self.b))) if self.b else 0

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        noise = None
        for index in range(max(0, chunk.index - self.depth), chunk.index + 1):
            each = chunk_before(chunk, index, self.frames)
            fresh = self.white(each, draw, (*shape[:2], each.length, *shape[3:]))
            noise = fresh if noise is None else self.follow(noise, fresh)
        return noise

    def follow(self, before: Tensor, fresh: Tensor) -> Tensor:
        """Return the noise after `before`; frames that the chunk before lacks are fresh."""
        count = min(before.shape[2], fresh.shape[2])
        mixed = self.b * before[:, :, :count] + (1 - self.b**2) ** 0.5 * fresh[:, :, :count]
        return torch.cat((mixed, fresh[:, :, count:]), dim=2)
