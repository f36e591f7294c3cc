"""Rewards as an objective: −Σ weight · reward + l2 · ½ mean(Δ²) (AutoRefiner, eq. 9)."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..wan.vae import WanVAE
from .learner import stream
from .objective import MicroBatch
from .options import RefineOptions
from .precision import mixed_precision
from .residuals import Residuals
from .rewards.decode import decode_frames
from .rewards.reward import Mixture

DRAWS = 4  # of frames to compare two clips by


class RewardObjective:
    """Maximises rewards of frames drawn from the step's clips; only those are decoded."""

    ratio = 1
    learners = ()

    def __init__(self, options: RefineOptions, rewards: Mixture, vae: WanVAE) -> None:
        self.options, self.rewards, self.vae = options, rewards, vae.requires_grad_(False)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    def prepare(self, index: int, samples: Iterator[tuple[MicroBatch, Tensor]]) -> dict[str, float]:
        """Do nothing: rewards are frozen."""
        return {}

    def loss_arguments(self, batch: MicroBatch) -> tuple[tuple[Tensor, ...], dict[str, Hashable]]:
        """Return the prompts, and the step's index, which seeds the draw of frames."""
        return (), {"prompts": batch.prompts, "index": batch.index}

    def loss(
        self,
        clean: Tensor,
        context: Tensor,
        residuals: Residuals,
        *,
        prompts: tuple[str, ...],
        index: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; log it, the weighted reward, each reward's mean, and the penalty."""
        rewards, scores = self._rewards(clean, prompts, stream(self.options.seed, index, 2))
        reward, penalty = rewards.mean(), residuals.penalty(rewards.device)
        loss = self.options.l2 * penalty - reward
        means = {name: each.mean() for name, each in scores.items()}
        return loss, {"loss": loss, "reward": reward, **means, "l2": penalty}

    @torch.no_grad()
    def improvement(self, before: Tensor, after: Tensor, batch: MicroBatch) -> float:
        """Return the mean gain in weighted reward, over several draws of frames."""
        gains = []
        for number in range(DRAWS):
            key = self.options.seed, number, batch.use  # the same frames of both clips
            old, new = (
                self._rewards(clips, batch.prompts, stream(*key))[0] for clips in (before, after)
            )
            gains.append((new - old).mean())
        return torch.stack(gains).mean().item()

    def _rewards(
        self, clean: Tensor, prompts: Sequence[str], rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return weighted rewards [B] of drawn frames, and each reward's scores [B] by name."""
        drawn = self.rewards.draw(rng, 4 * clean.shape[2] - 3)
        numbers = sorted(set().union(*drawn))
        with mixed_precision(clean.device, self.options.precision):
            frames = decode_frames(self.vae, clean, numbers)
            return self.rewards(frames, numbers, drawn, prompts)
