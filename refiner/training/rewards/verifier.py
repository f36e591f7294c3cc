"""A reward as what a search chooses by (refiner/samplers/search.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...schedule import Chunk
from ...wan.vae import WanVAE
from .decode import CONTEXT, decode_frames
from .reward import Mixture


@dataclass(frozen=True, slots=True)
class RewardVerifier:
    """Scores the newest frames of each candidate video, decoded, under its prompt; one prompt a sample."""

    rewards: Mixture
    vae: WanVAE
    prompts: Sequence[str]
    context: int = CONTEXT

    @torch.no_grad()
    def __call__(self, latents: Tensor, chunk: Chunk) -> Tensor:
        """The weighted reward [B] of latents [B, C, F, h, w] of the run so far, whose last chunk is the candidate."""
        frames = latents.shape[2]
        total = 4 * frames - 3
        new = 4 * chunk.length if frames > chunk.length else total
        drawn = self.rewards.newest(total, new)
        numbers = sorted(set().union(*drawn))
        return self.rewards(decode_frames(self.vae, latents, numbers, self.context), numbers, drawn, self.prompts)[0]
