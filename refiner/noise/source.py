"""Where noise comes from: one random stream for every place in a run where noise is drawn."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..schedule import Chunk


@dataclass(frozen=True, slots=True)
class Draw:
    """Which noise of a chunk: the level it leads to (0 is the chunk's start), a repeat of it, a search candidate."""

    level: int
    repeat: int = 0
    candidate: int = 0


class NoiseSource(Protocol):
    """A distribution of noise."""

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        """Noise of `shape` [B, C, F, h, w] for a chunk, fp32."""
        ...


@dataclass(frozen=True, slots=True)
class WhiteNoise:
    """N(0, I) from one CPU generator for each (seed, sample, first latent frame, level, repeat, candidate).

    So the same seed gives the same noise on every device, at every batch size, and in a run that was stopped and
    continued; the global generator is never touched. `first` is the number of the batch's first sample. Raises
    ValueError for a seed of more than 64 bits, sign included.
    """

    seed: int
    first: int = 0

    def __post_init__(self) -> None:
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}: give one from {-(1 << 63)} to {(1 << 63) - 1}")

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        samples = []
        for sample in range(self.first, self.first + shape[0]):
            key = (sample, chunk.start, draw.level, draw.repeat, draw.candidate)
            digest = hashlib.blake2b(struct.pack("<6q", self.seed, *key), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
            samples.append(torch.randn(shape[1:], generator=generator))
        return torch.stack(samples)


@dataclass(frozen=True, slots=True)
class GivenNoise:
    """Noise of whole clips that was drawn before, [levels, B, C, F, h, w] on any device: repeats and candidates share
    it."""

    noise: Tensor

    @classmethod
    def of(
        cls, source: NoiseSource, chunks: Sequence[Chunk], frame_shape: tuple[int, int, int, int], last: int = 0
    ) -> "GivenNoise":
        """What a source gives for each chunk's levels down to the nominal step `last`, once and on the CPU; zeros where
        another chunk has more levels. `frame_shape` is [B, C, h, w]."""
        batch, channels, height, width = frame_shape
        depth = max(sum(level.step >= last for level in chunk.levels) for chunk in chunks)
        noise = torch.zeros(depth, batch, channels, sum(chunk.length for chunk in chunks), height, width)
        given = cls(noise)
        for chunk in chunks:
            shape = (batch, channels, chunk.length, height, width)
            for draw in (Draw(i) for i, level in enumerate(chunk.levels) if level.step >= last):
                given(chunk, draw, shape).copy_(source(chunk, draw, shape))
        return given

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        return self.noise[draw.level, :, :, chunk.start : chunk.start + shape[2]]
