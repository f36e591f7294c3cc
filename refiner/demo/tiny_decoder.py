"""The sprites' tiny decoder, for previews: a latent's pixels at once, from its neighbours."""

import torch
from torch import Tensor, nn

from ..wan.vae_layers import StreamState, zero_frames

CHANNELS = 16
CELL, GROUP = 8, 4  # a latent's side in pixels, and its frames (of the first, the last alone)
WIDTH = 52  # 0.19 MB in bf16


class SpriteTinyDecoder(nn.Module):
    """Decode latents [B, 16, f, h, w] to pixels [B, 3, F, 8h, 8w] in about [-1, 1].

    Three convolutions see a latent, its neighbours and the latents before; one linear map of what
    they find and of the latent itself gives its four frames of 8x8 pixels.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.near = nn.Conv2d(2 * CHANNELS, width, 3, padding=1)
        self.far = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1)
        )
        self.pixels = nn.Conv2d(CHANNELS + width, GROUP * 3 * CELL**2, 1)

    def features(self, latents_BTChw: Tensor, state: StreamState) -> Tensor:
        """Return what `pixels` maps, [B T, C, h, w]."""
        x = latents_BTChw
        before = state.last.get(self)
        before = zero_frames(x, 1) if before is None else before
        state.last[self] = x[:, -1:].clone()
        past = torch.cat((before, x[:, :-1]), dim=1)
        near = self.near(torch.cat((x, past), dim=2).flatten(0, 1)).relu()
        return torch.cat((x.flatten(0, 1), (near + self.far(near)).relu()), dim=1)

    def decode(self, latents_BCfhw: Tensor, state: StreamState | None = None) -> Tensor:
        """Decode the next latents of a video: 1 frame for the first latent, 4 for each later one.

        `state` continues earlier calls and is updated; without one the latents start a video.
        """
        state = StreamState() if state is None else state
        starts = not state.last
        x = latents_BCfhw.to(self.pixels.weight).transpose(1, 2)
        frames = self.pixels(self.features(x, state)).unflatten(1, (GROUP, -1)).flatten(0, 1)
        video = nn.functional.pixel_shuffle(frames, CELL).unflatten(0, (len(x), -1))
        return video.transpose(1, 2)[:, :, GROUP - 1 if starts else 0 :]
