"""Rotary position embedding of Wan2.1: (frame, row, column) angles in float64, any positions."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .upload import cached_tensors, upload

THETA = 10000.0
CACHED_TABLES = 4  # few, as one table of a large video takes megabytes


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return a head's complex pairs for time, height and width: 22, 21, 21 for a 128-wide head."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


@lru_cache
def frequencies_of(pairs: int) -> tuple[float, ...]:
    """Return RoPE's frequencies of an axis with this many pairs, in radians a position."""
    return tuple((THETA ** -(torch.arange(pairs, dtype=torch.float64) / pairs)).tolist())


@cached_tensors(CACHED_TABLES)
def rotations(
    frames: tuple[int, ...],
    height: int,
    width: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    temporal: tuple[float, ...] | None = None,
) -> Tensor:
    """Return unit complex rotations [F·H·W, head_dim/2], frame-major, for temporal positions.

    Spatial positions start at 0. `dtype` is the complex type of the result. `temporal` replaces the
    frequencies of the temporal pairs. Angles are computed in float64, so that large positions stay
    exact (bf16 positions collapse beyond 256, and published tables end at 1024).
    """
    axes = (torch.tensor(frames), torch.arange(height), torch.arange(width))
    grids = torch.meshgrid(*axes, indexing="ij")
    angles = []
    own = [frequencies_of(pairs) for pairs in axis_pairs(head_dim)]
    for grid, frequencies in zip(grids, (temporal or own[0], *own[1:]), strict=True):
        frequency = torch.tensor(frequencies, dtype=torch.float64)
        angles.append(grid.flatten().double().outer(frequency))
    angle = torch.cat(angles, dim=1)
    return upload(torch.polar(torch.ones_like(angle), angle), device, dtype)


def span(start: int, frames: int) -> tuple[int, ...]:
    """Return the temporal positions of `frames` consecutive latent frames from `start`."""
    return tuple(range(start, start + frames))


def rotation_table(
    positions: Sequence[int],
    height: int,
    width: int,
    head_dim: int,
    like: Tensor,
    frequencies: tuple[float, ...] | None = None,
) -> Tensor:
    """Return `rotations` on the device of `like`: complex128 for float64, else complex64.

    `frequencies` replace the temporal ones.
    """
    dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
    grid = height, width
    return rotations(tuple(positions), *grid, head_dim, dtype, like.device, frequencies)


def rotate(x_BNHD: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of every head by `table` [N, D/2], keeping the dtype of x."""
    wide = x_BNHD if x_BNHD.dtype in (torch.float32, torch.float64) else x_BNHD.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).to(x_BNHD.dtype)
