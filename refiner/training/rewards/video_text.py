"""Video rewards: how well a clip fits the prompt, by any model that embeds both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .reward import FrameDraw


class VideoTextModel(Protocol):
    """A frozen model that embeds clips and texts in one space, as InternVideo2 or the sprites'."""

    def embed_video(self, frames_BFCHW: Tensor, numbers: Tensor) -> Tensor:
        """Embed frames [B, F, 3, H, W] in 0–1 of these indices [F] as unit vectors [B, D]."""
        ...

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts as unit vectors [B, D]."""
        ...


@dataclass(frozen=True, slots=True)
class VideoTextReward:
    """The cosine of a clip's and a prompt's embeddings."""

    name: str
    model: VideoTextModel
    frames: FrameDraw
    range: tuple[float, float] = (-1.0, 1.0)

    def __call__(
        self, frames_BFCHW: Tensor, numbers: Sequence[int], prompts: Sequence[str]
    ) -> Tensor:
        """Return scores [B]; see Reward."""
        with torch.no_grad():
            text = self.model.embed_text(prompts)
        video = self.model.embed_video(
            frames_BFCHW, torch.tensor(numbers, device=frames_BFCHW.device)
        )
        return (video.float() * text.float()).sum(-1)
