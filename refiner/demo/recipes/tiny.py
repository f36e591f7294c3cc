"""Training of the sprites' tiny decoder, which draws previews: pixels from the VAE's latents."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pictures import contact_sheet
from ...training.learner import Learner, LearnerStage, noise_stream, stream, warm_cosine
from ...video import to_frames
from ...wan.vae import WanVAE
from ...wan.vae_layers import StreamState
from ..render import clip_batch
from ..tiny_decoder import CELL, GROUP, SpriteTinyDecoder
from .data import Clips
from .vae import decibel, psnr

SHOWN = 8  # held-out clips of the scores


@dataclass(frozen=True, slots=True)
class TinyOptions:
    """Options of the recipe, which trains on the first latents of a few encoded clips."""

    steps: int = 900
    clips: int = 256
    latents: int = 11  # of each clip, 41 frames
    batch: int = 8
    learning_rate: float = 3e-3
    noise: float = 0.1  # on latents of unit variance: a sampler's are not exact
    ema: float = 0.99
    seed: int = 0


class TinyStage(LearnerStage):
    """Training state of the tiny decoder; `vae` only gives the held-out clips' latents."""

    def __init__(self, options: TinyOptions, clips: Clips, vae: WanVAE) -> None:
        self.options, self.vae, self.device = options, vae, vae.conv1.weight.device
        self.latents = clips.latents[: options.clips, :, : options.latents].float().to(self.device)
        frames = 1 + GROUP * (options.latents - 1)
        rendered = [clip_batch([seed], frames=frames)[0] for seed in range(len(self.latents))]
        self.pixels = torch.cat([(127.5 * (clip + 1)).round().byte() for clip in rendered])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            tiny = SpriteTinyDecoder().to(self.device)
        start(tiny)
        self.fit_pixels(tiny)
        self.learner = Learner(tiny, options.learning_rate, options.ema)

    def step(self, index: int) -> dict[str, float]:
        options = self.options
        rng = stream(options.seed, index, 0)
        chosen = torch.from_numpy(rng.integers(len(self.latents), size=options.batch))
        latents = self.latents[chosen.to(self.device)]
        generator = noise_stream(self.device, options.seed, index, 1)
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        pixels = in_range(self.pixels[chosen].to(self.device))
        loss = F.mse_loss(self.learner.model.decode(latents + options.noise * noise), pixels)
        self.learner.step(loss, index, warm_cosine(index, options.steps))
        return {"loss": loss.item(), "dB": decibel(loss.item())}

    def finished(self) -> SpriteTinyDecoder:
        """Return the average model with its last layer fitted anew."""
        tiny = copy.deepcopy(self.learner.average)
        self.fit_pixels(tiny)
        return tiny.cpu()

    @torch.no_grad()
    def fit_pixels(self, tiny: SpriteTinyDecoder) -> None:
        """Set the last layer by least squares, over all clips with the noise of training."""
        channels, outputs = tiny.pixels.in_channels + 1, tiny.pixels.out_channels
        gram = torch.zeros(channels, channels, dtype=torch.float64, device=self.device)
        moment = torch.zeros(channels, outputs, dtype=torch.float64, device=self.device)
        generator = noise_stream(self.device, self.options.seed, 2)
        for latents, pixels in zip(self.latents, self.pixels, strict=True):
            noise = torch.randn(latents.shape, generator=generator, device=self.device)
            x = (latents + self.options.noise * noise)[None].transpose(1, 2)
            known = tiny.features(x, StreamState())[1:].movedim(1, -1).flatten(0, 2)
            known = F.pad(known, (0, 1), value=1.0).double()
            wanted = cells(in_range(pixels.to(self.device))).double()
            gram += known.T @ known
            moment += known.T @ wanted
        solved = torch.linalg.lstsq(gram, moment, driver="gelsd").solution.float()
        tiny.pixels.weight.copy_(solved[:-1].T[..., None, None])
        tiny.pixels.bias.copy_(solved[-1])

    def show(self, folder: Path, index: int) -> dict[str, float]:
        return show_tiny(self.finished().to(self.device), self.vae, folder, index)


def in_range(pixels: Tensor) -> Tensor:
    """Convert uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def cells(pixels_CFHW: Tensor) -> Tensor:
    """Return the pixels of each latent but the first, one row a latent: [n h w, 4 · 3 · 64]."""
    groups = pixels_CFHW[:, 1:].unflatten(1, (-1, GROUP)).movedim(0, 2)  # [n, 4, C, H, W]
    return F.pixel_unshuffle(groups, CELL).flatten(1, 2).movedim(1, -1).flatten(0, 2)


@torch.no_grad()
def start(tiny: SpriteTinyDecoder) -> None:
    """Initialise for ReLU; the second block begins at zero."""
    for module in tiny.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    nn.init.zeros_(tiny.far[-1].weight)


@torch.no_grad()
def show_tiny(tiny: SpriteTinyDecoder, vae: WanVAE, folder: Path, index: int) -> dict[str, float]:
    """Score held-out clips against the VAE's pixels and the truth; draw the VAE over the tiny."""
    device = vae.conv1.weight.device
    scores, truth, frames = [], [], []
    for seed in range(SHOWN):
        pixels = clip_batch([seed], "test", 33)[0].to(device)
        latents = vae.encode(pixels)
        whole, rough = (one.decode(latents).clamp(-1, 1) for one in (vae, tiny))
        scores.append(psnr(rough, whole))
        truth.append(psnr(rough, pixels))
        if seed < 4:
            frames += [*to_frames(whole)[:32:4], *to_frames(rough)[:32:4]]
    contact_sheet(frames, folder / f"sheet_{index:06d}.png", columns=8)
    return {"psnr": float(np.mean(scores)), "psnr of truth": float(np.mean(truth))}
