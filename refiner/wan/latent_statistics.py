"""Wan2.1's latent statistics: raw VAE latents to the pack's normalised ones, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Published mean and standard deviation of each latent channel. The pack's latents are
# (raw - mean) / std.
# fmt: off
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on
CHANNELS = len(LATENT_MEAN)


def channel_column(values: Sequence[float] | float, channels: int, name: str) -> Tensor:
    """Return one value, or one per channel, as [C, 1, 1, 1].

    Raises ValueError, which mentions `name`, for any other number of values.
    """
    column = torch.tensor(values, dtype=torch.float32)
    if column.numel() not in (1, channels):
        raise ValueError(
            f"{name} has {column.numel()} values: give one, or one for each of {channels} channels"
        )
    return column.expand(channels).reshape(-1, 1, 1, 1).clone()


def normalized(raw_BCFhw: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """Normalise a VAE's raw latents, by Wan2.1's statistics unless others are given."""
    mean = channel_column(LATENT_MEAN, CHANNELS, "mean").to(raw_BCFhw) if mean is None else mean
    std = channel_column(LATENT_STD, CHANNELS, "std").to(raw_BCFhw) if std is None else std
    return (raw_BCFhw - mean) / std


def raw_latents(
    latents_BCFhw: Tensor, mean: Tensor | None = None, std: Tensor | None = None
) -> Tensor:
    """Undo `normalized`, by Wan2.1's statistics unless others are given."""
    mean = channel_column(LATENT_MEAN, CHANNELS, "mean").to(latents_BCFhw) if mean is None else mean
    std = channel_column(LATENT_STD, CHANNELS, "std").to(latents_BCFhw) if std is None else std
    return latents_BCFhw * std + mean
