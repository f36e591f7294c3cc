"""Rewards as an objective (AutoRefiner, eq. 9 and Algorithm 1): −Σ weight · reward + l2 · ½
mean(Δ²)."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..wan.vae import WanVAE
from .learner import stream
from .objective import Part
from .options import RefineOptions
from .precision import mixed_precision
from .residuals import Residuals
from .rewards.decode import decode_frames
from .rewards.reward import Mixture

DRAWS = 4  # of the frames that two clips are compared by


class RewardObjective:
    """Draws frames of the step's clips, decodes those alone, and raises what the rewards say of
    them."""

    ratio = 1
    learners = ()

    def __init__(self, options: RefineOptions, rewards: Mixture, vae: WanVAE) -> None:
        self.options, self.rewards, self.vae = options, rewards, vae.requires_grad_(False)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    def prepare(self, index: int, samples: Iterator[tuple[Part, Tensor]]) -> dict[str, float]:
        """Nothing: rewards are frozen."""
        return {}

    def given(self, part: Part) -> tuple[tuple[Tensor, ...], dict[str, Hashable]]:
        """The prompts, and the step whose frames are drawn."""
        return (), {"prompts": part.prompts, "index": part.index}

    def loss(
        self,
        clean: Tensor,
        context: Tensor,
        residuals: Residuals,
        *,
        prompts: tuple[str, ...],
        index: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logged are the loss, the weighted reward, each reward's own mean, and the penalty."""
        rewards, scores = self._rewards(clean, prompts, stream(self.options.seed, index, 2))
        reward, penalty = rewards.mean(), residuals.penalty(rewards.device)
        loss = self.options.l2 * penalty - reward
        own = {name: each.mean() for name, each in scores.items()}
        return loss, {"loss": loss, "reward": reward, **own, "l2": penalty}

    @torch.no_grad()
    def improvement(self, before: Tensor, after: Tensor, part: Part) -> float:
        """The mean weighted reward of `after` less that of `before`, over several draws of
        frames."""
        gains = []
        for number in range(DRAWS):
            rewards = [
                self._rewards(clips, part.prompts, stream(self.options.seed, number, part.use))[0]
                for clips in (before, after)
            ]
            gains.append((rewards[1] - rewards[0]).mean())
        return torch.stack(gains).mean().item()

    def _rewards(
        self, clean: Tensor, prompts: Sequence[str], rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted rewards [B] of drawn frames, and each reward's own scores [B] by name."""
        drawn = self.rewards.draw(rng, 4 * clean.shape[2] - 3)
        numbers = sorted(set().union(*drawn))
        with mixed_precision(clean.device, self.options.precision):
            frames = decode_frames(self.vae, clean, numbers)
            return self.rewards(frames, numbers, drawn, prompts)
