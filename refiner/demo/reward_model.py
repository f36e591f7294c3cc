"""The sprites' text-video model: embeds clips of 64x64 frames and captions in one space."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.rewards.reward import FrameDraw
from .motion import FPS
from .text_encoder import SpriteTextEncoder

# Dense enough to see the direction of a square's fastest spin, long enough for a third of the
# slowest swing.
FRAMES = FrameDraw(8, interval=3, opening=0.25)
PERIODS = (0.5, 1, 2, 4, 8, 16)  # seconds, of the waves that encode a frame's time
SIDE = 4  # of the feature map
PIXELS = SIDE << 4  # a frame's side, which four stages halve


class SpriteVideoText(nn.Module):
    """Convolutions per frame (one of them over three frames), a transformer over all places."""

    def __init__(self, dim: int = 128, text_dim: int = 96, text_len: int = 32) -> None:
        super().__init__()
        self.captions = SpriteTextEncoder(text_dim, text_len)
        self.from_text = nn.Linear(text_dim, dim)
        self.edges = _stage(3, 32, 5)
        self.parts = _stage(32, 48, 3)
        self.moves = _stage(3 * 48, 96, 3)
        self.things = _stage(96, dim, 3)
        self.place = nn.Parameter(0.02 * torch.randn(SIDE * SIDE, dim))
        self.time = nn.Linear(2 * len(PERIODS), dim)
        layer = nn.TransformerEncoderLayer(
            dim, 4, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)
        self.from_video = nn.Linear(dim, dim)
        # log of the inverse temperature of training's softmax over cosines
        self.sharpness = nn.Parameter(torch.tensor(math.log(10.0)))

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed captions as unit vectors [B, D]."""
        context = self.captions([*prompts])
        words = (context.abs().sum(-1) > 0).sum(1, keepdim=True).clamp_min(1)
        return F.normalize(self.from_text(context.sum(1) / words).float(), dim=-1)

    def embed_video(self, frames_BFCHW: Tensor, numbers: Tensor) -> Tensor:
        """Embed frames [B, F, 3, 64, 64] in 0–1 as unit vectors [B, D].

        `numbers` [F] or [B, F] are the frames' indices. ValueError for frames of other sizes.
        """
        height, width = frames_BFCHW.shape[-2:]
        if (height, width) != (PIXELS, PIXELS):
            raise ValueError(
                f"frames of {width}x{height} pixels: the sprites' reward sees {PIXELS}x{PIXELS},"
                " make clips of that size or take another reward"
            )
        batch, frames = frames_BFCHW.shape[:2]
        x = self.parts(self.edges(2 * frames_BFCHW.flatten(0, 1) - 1)).unflatten(0, (batch, frames))
        padded = torch.cat((x[:, :1], x, x[:, -1:]), dim=1)
        x = torch.cat((padded[:, :-2], x, padded[:, 2:]), dim=2)
        x = self.things(self.moves(x.flatten(0, 1))).flatten(2).transpose(1, 2) + self.place
        time = self.time(self._waves(numbers).to(x.device)).expand(batch, -1, -1)
        x = x.unflatten(0, (batch, frames)) + time[:, :, None]
        pooled = self.norm(self.layers(x.flatten(1, 2))).mean(1)
        return F.normalize(self.from_video(pooled).float(), dim=-1)

    def _waves(self, numbers: Tensor) -> Tensor:
        """Return sines and cosines [1 or B, F, …] of the frames' times."""
        seconds = numbers.reshape(-1, numbers.shape[-1], 1).float() / FPS
        angle = 2 * math.pi * seconds / torch.tensor(PERIODS, device=numbers.device)
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


def _stage(into: int, out: int, taps: int) -> nn.Sequential:
    """Build a stage that halves the side."""
    return nn.Sequential(
        nn.Conv2d(into, out, taps, stride=2, padding=taps // 2), nn.GroupNorm(8, out), nn.GELU()
    )
