"""Antiphase noise: neighbouring frames of a chunk get noise of opposite tendency (after FLEX)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..schedule import Chunk
from .shaping import Shaping, shaping
from .source import Draw, NoiseSource


def antiphase(rho: float = 0.2, path: int = 0) -> Shaping:
    """Make ε_f = √(1 − ρ) n_f + √ρ (−1)^f n for frame f of a chunk, with n shared by its frames.

    Frames of a chunk have the correlation −ρ, ρ, −ρ … by their distance. ρ = 0 is white.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"antiphase noise, rho {rho:g}: give a number from 0 (white) to 1")
    return shaping(lambda white, chunk: AntiphaseNoise(white, rho), path)


@dataclass(frozen=True, slots=True)
class AntiphaseNoise:
    """Add noise that the frames of a chunk share, with alternating signs."""

    white: NoiseSource
    rho: float

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        frames = self.white(chunk, draw, shape)
        # nominal steps are positive, so no level shares this stream
        shared = self.white(chunk, replace(draw, step=-draw.step), (*shape[:2], 1, *shape[3:]))
        signs = (-1.0) ** torch.arange(shape[2])[:, None, None]
        return (1 - self.rho) ** 0.5 * frames + self.rho**0.5 * signs * shared
