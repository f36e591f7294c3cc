"""A reward as what a search chooses by (refiner/samplers/search.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...schedule import Chunk
from ...wan.vae import DecoderState, WanVAE
from .reward import Mixture


@dataclass(frozen=True, slots=True)
class RewardVerifier:
    """Scores the newest frames of each candidate video, decoded, under its prompt; one prompt a
    sample."""

    rewards: Mixture
    vae: WanVAE
    prompts: Sequence[str]

    def begin(self) -> "RewardJudge":
        """A judge of a run from its first chunk on, a given one where there are any."""
        return RewardJudge(self)


@dataclass(slots=True)
class RewardJudge:
    """Decodes each candidate from where the decoder stands behind the chunks that were kept.

    Of what was kept it holds the decoder's state and as many frames as a reward looks back at,
    however long the video.
    """

    verifier: RewardVerifier
    state: DecoderState = field(default_factory=DecoderState)
    frames: Tensor | None = None  # the last that were kept [B, F, 3, H, W] in 0–1
    kept: int = 0  # pixel frames in all
    chosen: Tensor | None = None  # kept, but decoded only if another chunk follows

    @torch.no_grad()
    def score(self, x0: Tensor, chunk: Chunk) -> Tensor:
        """The weighted reward [B] of a candidate [B, C, F, h, w] for the next chunk."""
        self._advance()
        rewards, prompts = self.verifier.rewards, self.verifier.prompts
        new, frames = self._decoded(x0, self.state.clone())
        total = self.kept + new
        drawn = rewards.newest(total, new)
        numbers = sorted(set().union(*drawn))
        first = total - frames.shape[1]
        return rewards(frames[:, [number - first for number in numbers]], numbers, drawn, prompts)[
            0
        ]

    def keep(self, x0: Tensor, chunk: Chunk) -> None:
        """Go on from this one."""
        self._advance()
        self.chosen = x0

    def _advance(self) -> None:
        """Decode what was chosen last."""
        if self.chosen is None:
            return
        chosen, self.chosen = self.chosen, None
        new, frames = self._decoded(chosen, self.state)
        self.kept += new
        self.frames = frames[:, max(0, frames.shape[1] - self.verifier.rewards.reach) :].clone()

    @torch.no_grad()
    def _decoded(self, x0: Tensor, state: DecoderState) -> tuple[int, Tensor]:
        """How many frames a chunk has, and they behind the kept ones."""
        pixels = ((self.verifier.vae.decode(x0, state).transpose(1, 2) + 1) / 2).clamp(0, 1)
        return pixels.shape[1], pixels if self.frames is None else torch.cat(
            (self.frames, pixels), dim=1
        )
