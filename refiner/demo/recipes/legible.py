"""Linear readouts that make each latent legible: shapes' coverage, colours, and the picture.

A transformer quickly learns features that are the same anywhere in a latent's cell. Without this
loss a VAE encodes a shape differently at every place within a cell, and a text-to-video model
does not learn the words for shapes. VA-VAE (Yao et al. 2025) aligns latents with a pretrained
model's features for the same reason; here the renderer provides the targets.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..render import render_parts, to_pixels
from ..scene import Scene
from ..shapes import SHAPES

CELL, GROUP = 8, 4  # a latent's side in pixels, its frames (but the first latent has one)
FINE = 2  # side in pixels of the picture's squares
FACTS = len(SHAPES) + 2 * 3
SEEN = 0.04  # share of a cell that must be covered to ask which shape covers it


def shown(scene: Scene, frames: int) -> tuple[Tensor, Tensor]:
    """Render a scene's pixels [3, F, H, W] in [-1, 1] and the facts [12, F, H, W] of each.

    The facts are each shape's coverage, the objects' colour times coverage, and the ground's
    colour, both in [-1, 1].
    """
    parts = render_parts(scene, frames)
    covered = parts.shapes.sum(axis=0)
    facts = (parts.shapes, parts.colour / 127.5 - covered, parts.ground / 127.5 - 1)
    return to_pixels(parts.video), torch.from_numpy(np.concatenate(facts))


def by_latent(frames_BCFHW: Tensor, side: int, times: int = 1) -> Tensor:
    """Average 1 + 4n frames over squares of `side` and each latent's frames.

    With `times` 2, average the first and second half of a latent's frames separately. Returns
    [B, C·times, 1 + n, H/side, W/side].
    """
    flat = F.avg_pool3d(frames_BCFHW, (1, side, side))
    first, rest = flat[:, :, :1], flat[:, :, 1:].unflatten(2, (-1, times, GROUP // times)).mean(4)
    halves = torch.cat((first[:, :, :, None].expand(-1, -1, -1, times, -1, -1), rest), dim=2)
    return halves.transpose(2, 3).flatten(1, 2)


def picture_of(pixels_BCFHW: Tensor) -> Tensor:
    """Return the picture that a latent encodes, by cell: [B, 3·2·16, 1 + n, H/8, W/8]."""
    fine = by_latent(pixels_BCFHW, FINE, times=2)
    batch, _, latents = fine.shape[:3]
    flat = F.pixel_unshuffle(fine.transpose(1, 2).flatten(0, 1), CELL // FINE)
    return flat.unflatten(0, (batch, latents)).transpose(1, 2)


class Reader(nn.Module):
    """The linear readouts, discarded after training."""

    def __init__(self, z_dim: int = 16) -> None:
        super().__init__()
        self.facts = nn.Conv3d(z_dim, FACTS, 1)
        self.which = nn.Conv3d(z_dim, len(SHAPES), 1)
        self.picture = nn.Conv3d(z_dim, 3 * 2 * (CELL // FINE) ** 2, 1)

    def forward(self, latents: Tensor, pixels: Tensor, facts: Tensor) -> dict[str, Tensor]:
        """Return the losses of latents [B, 16, 1 + n, h, w].

        Squared errors of coverage and of colours, each summed over channels; cross-entropy of
        the shape in covered cells; mean squared error of the picture.
        """
        true = by_latent(facts, CELL)
        error = (self.facts(latents) - true).square().mean((0, 2, 3, 4))
        covered = true[:, : len(SHAPES)]
        total = covered.sum(1)
        surprise = F.cross_entropy(self.which(latents), covered.argmax(1), reduction="none")
        weight = total * (total > SEEN)
        return {
            "covers": error[: len(SHAPES)].sum(),
            "colours": error[len(SHAPES) :].sum(),
            "which": (surprise * weight).sum() / weight.sum().clamp_min(1),
            "picture": F.mse_loss(self.picture(latents), picture_of(pixels)),
        }


@torch.no_grad()
def linear_shares(latents: Tensor, facts: Tensor) -> dict[str, float]:
    """Return the share of the facts' variance explained linearly by latents [B, 16, 1 + n, h, w].

    Fitted on the odd clips and measured on the even ones; means over shapes, and over colours.
    """
    pair = [each.double().cpu().movedim(1, -1) for each in (latents, by_latent(facts, CELL))]
    fit, test = ([each[start::2].flatten(0, -2) for each in pair] for start in (1, 0))
    solved = torch.linalg.lstsq(F.pad(fit[0], (0, 1), value=1.0), fit[1], driver="gelsd").solution
    error = F.pad(test[0], (0, 1), value=1.0) @ solved - test[1]
    share = 1 - error.square().mean(0) / test[1].var(0, unbiased=False).clamp_min(1e-9)
    return {
        "covers": share[: len(SHAPES)].mean().item(),
        "colours": share[len(SHAPES) :][:3].mean().item(),
    }
