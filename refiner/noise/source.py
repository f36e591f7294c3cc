"""Noise sources: one random stream for every draw of a run."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..schedule import Chunk

# version of the key of WhiteNoise's streams; 1 counted a chunk's levels instead of naming them
VERSION = 2


@dataclass(frozen=True, slots=True)
class Draw:
    """Key of one noise of a chunk."""

    step: int  # nominal, of the level that the noise leads to
    repeat: int = 0  # of the level
    candidate: int = 0  # of a search
    take: int = 0  # of the chunk: raised each time that it is rerolled


class NoiseSource(Protocol):
    """A distribution of noise."""

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        """Return noise of `shape` [B, C, F, h, w] for a chunk, fp32."""
        ...


@dataclass(frozen=True, slots=True)
class WhiteNoise:
    """Gaussian noise, from one CPU generator per sample, chunk and draw.

    A generator is seeded by (seed, sample, first latent frame, nominal step, repeat, candidate) and
    by the take where it is not 0, so a seed gives the same noise on every device, at every batch
    size, in a resumed run, and at the levels that two level lists share. The global generator is
    not used. `first` is the number of
    the batch's first sample. Raises ValueError for a seed that does not fit into 64 bits.
    """

    seed: int
    first: int = 0

    def __post_init__(self) -> None:
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}: give one from {-(1 << 63)} to {(1 << 63) - 1}")

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        samples = []
        for sample in range(self.first, self.first + shape[0]):
            key = (self.seed, sample, chunk.start, draw.step, draw.repeat, draw.candidate)
            key += (draw.take,) if draw.take else ()
            digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
            samples.append(torch.randn(shape[1:], generator=generator))
        return torch.stack(samples)


Rerolls = tuple[tuple[int, int], ...]  # pairs (index of a chunk, takes), for it and later chunks


def take_of(index: int, rerolls: Rerolls) -> int:
    """Return the take of the chunk of an index: those of several rerolls add up."""
    return sum(takes for first, takes in rerolls if index >= first)


@dataclass(frozen=True, slots=True)
class RerolledNoise:
    """Draw rerolled chunks in another take."""

    source: NoiseSource
    rerolls: Rerolls

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        draw = replace(draw, take=draw.take + take_of(chunk.index, self.rerolls))
        return self.source(chunk, draw, shape)


@dataclass(frozen=True, slots=True)
class AntitheticNoise:
    """Noise in pairs of opposite signs: samples 2i and 2i + 1 are ε and -ε of sample i."""

    source: NoiseSource

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        half = self.source(chunk, draw, (shape[0] // 2, *shape[1:]))
        return torch.stack((half, -half), dim=1).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class GivenNoise:
    """Precomputed noise [levels, B, C, F, h, w]; ignores Draw.repeat and Draw.candidate.

    `steps` are the nominal steps of its levels. Raises ValueError when the numbers differ.
    """

    noise: Tensor
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.noise) != len(self.steps):
            raise ValueError(
                f"noise of {len(self.noise)} levels for steps {self.steps}: give one for each step"
            )

    @classmethod
    def of(
        cls,
        source: NoiseSource,
        chunks: Sequence[Chunk],
        frame_shape: tuple[int, int, int, int],
        last: int = 0,
    ) -> "GivenNoise":
        """Draw the noise of every chunk down to the nominal step `last` from a source, on the CPU.

        Zeros fill the levels that a chunk lacks. `frame_shape` is [B, C, h, w].
        """
        batch, channels, height, width = frame_shape
        named = {level.step for chunk in chunks for level in chunk.levels if level.step >= last}
        steps = tuple(sorted(named, reverse=True))
        frames = sum(chunk.length for chunk in chunks)
        given = cls(torch.zeros(len(steps), batch, channels, frames, height, width), steps)
        for chunk in chunks:
            shape = (batch, channels, chunk.length, height, width)
            for draw in (Draw(level.step) for level in chunk.levels if level.step >= last):
                given(chunk, draw, shape).copy_(source(chunk, draw, shape))
        return given

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        level = self.noise[self.steps.index(draw.step)]
        return level[:, :, chunk.start : chunk.start + shape[2]]
