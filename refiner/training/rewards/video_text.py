"""Video rewards: how well a clip of frames fits the prompt, by any model that embeds both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .reward import FrameDraw


class VideoTextModel(Protocol):
    """A frozen model with one space for clips and texts, InternVideo2 or the sprite world's own."""

    def embed_video(self, frames_BFCHW: Tensor, numbers: Tensor) -> Tensor:
        """Unit vectors [B, D], with a graph, of frames [B, F, 3, H, W] in 0–1 whose place in the
        video is [F]."""
        ...

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D]."""
        ...


@dataclass(frozen=True, slots=True)
class VideoTextReward:
    """The cosine of clip and prompt."""

    name: str
    model: VideoTextModel
    frames: FrameDraw
    range: tuple[float, float] = (-1.0, 1.0)

    def __call__(
        self, frames_BFCHW: Tensor, numbers: Sequence[int], prompts: Sequence[str]
    ) -> Tensor:
        """Scores [B], see Reward."""
        with torch.no_grad():
            text = self.model.embed_text(prompts)
        video = self.model.embed_video(
            frames_BFCHW, torch.tensor(numbers, device=frames_BFCHW.device)
        )
        return (video.float() * text.float()).sum(-1)
