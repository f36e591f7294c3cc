"""A reward that needs no model, and a tiny VAE to see by, for tests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autorefiner.refiner.training.rewards.reward import FrameDraw
from autorefiner.refiner.wan.vae import WanVAE

CLIP = FrameDraw(2, 3)


@dataclass(frozen=True)
class Brightness:
    """The mean of the frames times `scale`, which its range may not know of."""

    name: str = "brightness"
    scale: float = 1.0
    range: tuple[float, float] = (0.0, 1.0)
    frames: FrameDraw = CLIP

    def __call__(self, frames: Tensor, numbers: Sequence[int], prompts: Sequence[str]) -> Tensor:
        assert frames.shape[1] == len(numbers)
        return self.scale * frames.float().mean(dim=(1, 2, 3, 4))


def tiny_vae() -> WanVAE:
    """A frozen VAE of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanVAE(4).requires_grad_(False)
