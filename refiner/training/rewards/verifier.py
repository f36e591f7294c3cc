"""A reward as the verifier of a search (refiner/samplers/search.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...schedule import Chunk
from ...timeline import Timeline
from ...wan.vae import DecoderState, WanVAE
from .reward import Mixture


@dataclass(frozen=True, slots=True)
class RewardVerifier:
    """Scores the newest decoded frames of each candidate video under its sample's prompt."""

    rewards: Mixture
    vae: WanVAE
    prompts: Sequence[str] | Timeline[Sequence[str]]

    def prompts_of(self, chunk: Chunk) -> Sequence[str]:
        """Return the prompts, one a sample, that a chunk shows."""
        if isinstance(self.prompts, Timeline):
            return self.prompts.at(chunk.start).prompt
        return self.prompts

    @staticmethod
    def sample_bytes(
        dim: int, height: int, width: int, chunk: int, reach: int, dtype: torch.dtype
    ) -> int:
        """Count the bytes of judging one sample by a VAE of width `dim`; sizes are in pixels.

        To decode a candidate, the decoder's state after the chosen chunks, and the frames that the
        rewards see, twice while they are concatenated; `reach` is the rewards'.
        """
        decode = WanVAE.decode_bytes(dim, height, width, chunk, dtype)
        state = WanVAE.state_bytes(dim, height, width, dtype)
        return decode + state + 2 * 12 * (reach + 4 * chunk) * height * width

    def begin(self) -> "RewardJudge":
        """Start a judge for a run, from its first chunk on (a given one if there are any)."""
        return RewardJudge(self)


@dataclass(slots=True)
class RewardJudge:
    """Decodes each candidate from the decoder's state after the chosen chunks.

    Of those it stores only that state and as many frames as a reward looks back at, however long
    the video.
    """

    verifier: RewardVerifier
    state: DecoderState = field(default_factory=DecoderState)
    frames: Tensor | None = None  # the last decoded ones [B, F, 3, H, W] in 0–1
    num_frames: int = 0  # pixel frames decoded so far
    chosen: Tensor | None = None  # the last chunk, decoded only if another one follows

    @torch.no_grad()
    def score(self, x0: Tensor, chunk: Chunk) -> Tensor:
        """Return the weighted reward [B] of a candidate [B, C, F, h, w] for the next chunk."""
        self._advance()
        rewards, prompts = self.verifier.rewards, self.verifier.prompts_of(chunk)
        new, frames = self._decoded(x0, self.state.clone())
        return rewards.judge(frames, self.num_frames + new, new, prompts)

    def keep(self, x0: Tensor, chunk: Chunk) -> None:
        """Continue from this candidate."""
        self._advance()
        self.chosen = x0

    def _advance(self) -> None:
        """Decode the chunk that was chosen last."""
        if self.chosen is None:
            return
        chosen, self.chosen = self.chosen, None
        new, frames = self._decoded(chosen, self.state)
        self.num_frames += new
        self.frames = frames[:, max(0, frames.shape[1] - self.verifier.rewards.reach) :].clone()

    @torch.no_grad()
    def _decoded(self, x0: Tensor, state: DecoderState) -> tuple[int, Tensor]:
        """Decode a chunk; returns its number of frames, and all stored frames including them."""
        vae = self.verifier.vae
        decoded = vae.decode(x0.to(vae.latent_mean.dtype), state).float()
        pixels = ((decoded.transpose(1, 2) + 1) / 2).clamp(0, 1)
        frames = pixels if self.frames is None else torch.cat((self.frames, pixels), dim=1)
        return pixels.shape[1], frames
