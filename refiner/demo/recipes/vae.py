"""The sprites' VAE: reconstruction of short clips, a little KL, then a scale that Wan's published statistics fit."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...video import contact_sheet, to_frames
from ...wan.vae import ResidualBlock, WanVAE
from ..render import render, to_pixels
from ..world import sample_scene
from .parts import Learner, LearnerStage, noise_stream, stream, warm_cosine


@dataclass(frozen=True, slots=True)
class VaeOptions:
    """Of the recipe. Crops first: a quarter of the area holds the same edges and corners."""

    dim: int = 8
    steps: int = 6000
    crop_share: float = 0.4  # of the steps, on crops
    crop: int = 32
    crop_batch: int = 16
    crop_frames: int = 9
    batch: int = 2
    frames: int = 33
    learning_rate: float = 2e-3
    kl: float = 1e-4  # of the mean over latent elements
    edges: float = 0.5  # of the difference of neighbouring pixels
    ema: float = 0.998
    seed: int = 0


class VaeStage(LearnerStage):
    """Training state of the VAE: model, average, optimiser."""

    def __init__(self, options: VaeOptions, device: torch.device) -> None:
        self.options, self.device = options, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.model = WanVAE(options.dim, latent_mean=0.0, latent_std=1.0)
        for module in self.model.modules():
            if isinstance(module, ResidualBlock):  # branches that start at zero learn clearly faster
                torch.nn.init.zeros_(module.residual[-1].weight)
                torch.nn.init.zeros_(module.residual[-1].bias)
        self.learner = Learner(self.model.to(device), options.learning_rate, options.ema)

    def batch(self, index: int) -> Tensor:
        """Pixels [B, 3, F, H, W] of a step: crops in the first part of the run, whole frames after it."""
        options = self.options
        crops = index < options.crop_share * options.steps
        count, frames = (options.crop_batch, options.crop_frames) if crops else (options.batch, options.frames)
        rng = stream(options.seed, index, 0)
        clips = []
        for seed in rng.integers(1 << 40, size=count):
            clip = render(sample_scene(int(seed)), frames)
            if crops:
                top, left = rng.integers(0, clip.shape[1] - options.crop + 1, size=2)
                clip = clip[:, top : top + options.crop, left : left + options.crop]
            clips.append(to_pixels(clip))
        return torch.stack(clips).to(self.device)

    def step(self, index: int) -> dict[str, float]:
        options = self.options
        pixels = self.batch(index)
        generator = noise_stream(self.device, options.seed, index, 1)
        with torch.autocast(self.device.type, torch.bfloat16):
            mean, log_variance = self.model.moments(pixels)
            noise = torch.randn(mean.shape, generator=generator, device=self.device)
            decoded = self.model.decode(mean + (0.5 * log_variance).exp() * noise)
        decoded, mean, log_variance = decoded.float(), mean.float(), log_variance.float()
        error = F.l1_loss(decoded, pixels)
        edges = sum(F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis)) for axis in (3, 4)) / 2
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = error + options.edges * edges + options.kl * kl
        self.learner.step(loss, index, warm_cosine(index, options.steps))
        return {"loss": loss.item(), "l1": error.item(), "kl": kl.item()}

    def show(self, folder: Path, index: int) -> dict[str, float]:
        """PSNR of the average model on held-out clips, and truth over reconstruction of one."""
        scores, shown = [], []
        for seed in range(8):
            pixels = to_pixels(render(sample_scene(seed, "test"), 33))[None].to(self.device)
            decoded = reconstruct(self.learner.average, pixels)
            scores.append(psnr(decoded, pixels))
            if seed < 4:
                shown += [*to_frames(pixels)[:32:4], *to_frames(decoded)[:32:4]]
        contact_sheet(shown, folder / f"sheet_{index:06d}.png", columns=8)
        return {"psnr": float(np.mean(scores))}


@torch.no_grad()
def reconstruct(vae: WanVAE, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] encoded and decoded, in fp32."""
    return vae.decode(vae.encode(pixels)).clamp(-1, 1)


def psnr(decoded: Tensor, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio of clips in [-1, 1], in dB over all elements."""
    return (10 * torch.log10(4 / (decoded - pixels).square().mean())).item()


@torch.no_grad()
def latent_statistics(vae: WanVAE, clips: int = 64, frames: int = 33) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [16] of the raw latents of training clips."""
    means = [vae.moments(to_pixels(render(sample_scene(seed), frames))[None])[0] for seed in range(clips)]
    latents = torch.cat(means)
    return latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
