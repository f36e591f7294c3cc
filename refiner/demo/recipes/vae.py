"""Training of the sprites' VAE: reconstruction, a little KL, latents scaled to Wan's statistics."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pictures import contact_sheet
from ...training.ahead import Ahead, helpers
from ...training.learner import Learner, LearnerStage, noise_stream, stream, warm_cosine
from ...training.precision import mixed_precision
from ...training.replay import Replay
from ...video import to_frames
from ...wan.vae import WanVAE
from ...wan.vae_layers import Downsample, FrameAttention, ResidualBlock, Upsample
from ..bundle import scaled_vae
from ..render import clip_batch, render, to_pixels
from ..scene import Scene
from ..world import sample_scene
from .legible import CELL, GROUP, Reader, linear_shares, shown

LOGGED = ("covers", "colours", "which", "picture", "kl", "error")
HELD_OUT, SHOWN = 32, 8  # clips to encode for scores, and how many of them to decode


@dataclass(frozen=True, slots=True)
class VaeOptions:
    """Options of the recipe: first the encoder alone with the losses of legible.py, then both.

    Trains on crops, which hold the same edges and corners as frames, alternating 9 and 33 frames:
    a VAE trained on 9 alone drifts over 33.
    """

    dim: int = 8
    steps: int = 5400
    reading: float = 0.7  # share of the steps that train the encoder alone
    crop: int = 40
    crop_frames: tuple[int, int] = (9, 33)
    batch: int = 8  # longer crops, or as many shorter ones as have the same frames in all
    learning_rate: float = 4e-3
    muon: float = 1e-2
    joint: float = 0.6  # factor on both rates when the decoder is trained, too
    # Standard deviation of the noise on the latents: the VAE's constant posterior. Large, so that
    # a small model's slightly wrong latents still decode to a similar picture.
    noise: float = 0.3
    kl: float = 5e-3  # weight of half the mean square of the latents: the mean's term of the KL
    edges: float = 0.5  # weight of the error in differences of neighbouring pixels
    covers: float = 8.0  # weights of the readouts
    colours: float = 2.0
    which: float = 0.5
    picture: float = 1.0
    moved: float = 0.5  # share of steps with latents moved by a fraction of a cell (EQ-VAE)
    ema: float = 0.998
    seed: int = 0


class VaeStage(LearnerStage):
    """Training state of the VAE and the readouts of its latents."""

    def __init__(self, options: VaeOptions, device: torch.device) -> None:
        self.options, self.device = options, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            vae = WanVAE(options.dim, latent_mean=0.0, latent_std=1.0)
            start_linear(vae)
            parts = nn.ModuleDict({"vae": vae, "reader": Reader(vae.z_dim)}).to(device)
        self.learner = Learner(
            parts, options.learning_rate, options.ema, muon=options.muon, spared=("reader.",)
        )
        self.model, self.reader = parts["vae"], parts["reader"]
        self.replay = Replay(parts, device)
        self.crops = Ahead(partial(training_crops, options), options.steps, helpers(device))

    def step(self, index: int) -> dict[str, float]:
        options, rng = self.options, stream(self.options.seed, index, 2)
        pixels, facts = (tensor.to(self.device) for tensor in self.crops(index))
        start = int(options.reading * options.steps)
        joint = index >= start
        by = None
        if joint and rng.random() < options.moved:
            by = rng.integers(1, CELL, size=2).tolist()
        target = moved_pixels(pixels, by) if by else pixels
        generator = noise_stream(self.device, options.seed, index, 1)
        shapes = (latent_shape(self.model.z_dim, clips) for clips in (pixels, target))
        read, decoded = (
            torch.randn(shape, generator=generator, device=self.device) for shape in shapes
        )
        weights = torch.tensor(by or (0, 0), device=self.device) / CELL
        tensors, shift = (pixels, facts, read, decoded, target, weights), by is not None
        figures = self.replay(self._loss, *tensors, joint=joint, shift=shift)
        if joint:  # with a schedule for the second stage alone
            factor = options.joint * warm_cosine(index - start, options.steps - start)
        else:
            factor = warm_cosine(index, start)
        self.learner.update(index, factor)
        loss, *others = torch.stack(list(figures)).tolist()
        logged = {"loss": loss} | dict(zip(LOGGED, others, strict=False))
        return logged | ({"dB": decibel(logged.pop("error"))} if joint else {})

    def _loss(
        self, pixels: Tensor, facts: Tensor, read: Tensor, decoded: Tensor, target: Tensor,
        weights: Tensor, joint: bool, shift: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Return the loss and the figures that LOGGED names.

        `read` and `decoded` are the noises on the readouts' and the decoder's latents; with
        `shift`, the decoder's are moved by `weights` of a cell.
        """
        options = self.options
        with mixed_precision(self.device):
            mean = self.model.moments(pixels)[0]
            read_losses = self.reader(mean + options.noise * read, pixels, facts)
            kl = 0.5 * mean.float().square().mean()
            weighted = (getattr(options, name) * loss for name, loss in read_losses.items())
            loss = options.kl * kl + sum(weighted)
            if not joint:
                return [loss, *read_losses.values(), kl]
            mean = moved_latents(mean, weights) if shift else mean
            reconstruction = self.model.decode(mean + options.noise * decoded).float()
            error, off = reconstruction_loss(reconstruction, target, options.edges)
        return [loss + off, *read_losses.values(), kl, error]

    def finished(self) -> WanVAE:
        """Return the average model on the CPU, scaled for Wan's statistics.

        Its variance output is set to the constant of training.
        """
        vae = copy.deepcopy(self.learner.average["vae"]).cpu()
        with torch.no_grad():
            vae.conv1.weight[vae.z_dim :] = 0
            vae.conv1.bias[vae.z_dim :] = 2 * math.log(self.options.noise)
        return scaled_vae(vae, *latent_statistics(vae))

    def show(self, folder: Path, index: int) -> dict[str, float]:
        return show_vae(self.learner.average["vae"], folder, index)


def latent_shape(channels: int, pixels: Tensor) -> tuple[int, ...]:
    """Return the latents' shape [B, channels, 1 + n, H/8, W/8] for pixels [B, 3, 1 + 4n, H, W]."""
    batch, _, frames, height, width = pixels.shape
    return batch, channels, 1 + (frames - 1) // GROUP, height // CELL, width // CELL


def moved_latents(latents: Tensor, weights: Tensor) -> Tensor:
    """Interpolate latents [B, 16, F, h, w] `weights` [2] of a cell down and to the right.

    The result is a cell smaller each way.
    """
    for weight, axis in zip(weights, (3, 4), strict=True):
        cells = latents.shape[axis] - 1
        latents = torch.lerp(
            latents.narrow(axis, 0, cells), latents.narrow(axis, 1, cells), weight.to(latents.dtype)
        )
    return latents


def moved_pixels(pixels: Tensor, by: Sequence[int]) -> Tensor:
    """Crop pixels [B, 3, F, H, W] to match latents moved by these pixels down and right."""
    for offset, axis in zip(by, (3, 4), strict=True):
        pixels = pixels.narrow(axis, offset, pixels.shape[axis] - CELL)
    return pixels


def training_crops(options: VaeOptions, index: int) -> tuple[Tensor, Tensor]:
    """Draw a step's pixels [B, 3, F, H, W] and their facts [B, 12, F, H, W]."""
    frames = options.crop_frames[index % 2]
    count = max(1, options.batch * max(options.crop_frames) // frames)
    rng = stream(options.seed, index, 0)
    crops = [
        crop_of(sample_scene(int(seed)), frames, options.crop, rng)
        for seed in rng.integers(1 << 40, size=count)
    ]
    pixels, facts = zip(*crops, strict=True)
    return torch.stack(pixels), torch.stack(facts)


def crop_of(
    scene: Scene, frames: int, side: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Crop a scene near an object's start: pixels [3, F, S, S] and facts [12, F, S, S]."""
    column, row = scene.bodies[int(rng.integers(len(scene.bodies)))].path(np.zeros(1)).position[0]
    corner = np.array((row, column)) * scene.size + (rng.uniform(-0.3, 0.3, 2) - 0.5) * side
    top, left = np.clip(corner.round().astype(int), 0, scene.size - side).tolist()
    pixels, facts = (
        tensor[..., top : top + side, left : left + side] for tensor in shown(scene, frames)
    )
    return pixels, facts


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """Options of the decoder's second training, with a frozen encoder, on crops first.

    It sharpens the decoder; encoded clips stay valid.
    """

    steps: int = 1450
    crop_share: float = 0.6  # share of the steps on crops
    crop: int = 40
    batch: int = 8
    frames: int = 33
    learning_rate: float = 2e-3
    muon: float = 1e-2
    noise: float = 0.2  # on latents of unit variance
    edges: float = 0.5
    ema: float = 0.998
    seed: int = 1


class DecoderStage(LearnerStage):
    """Training state of a finished VAE's decoder."""

    def __init__(self, options: DecoderOptions, vae: WanVAE) -> None:
        self.options, self.vae = options, vae
        self.device = vae.conv1.weight.device
        vae.decoder.requires_grad_(True)
        vae.conv2.requires_grad_(True)
        parts = nn.ModuleList([vae.decoder, vae.conv2])
        self.learner = Learner(parts, options.learning_rate, options.ema, muon=options.muon)
        self.pixels = Ahead(partial(decoder_pixels, options), options.steps, helpers(self.device))
        self.replay = Replay(parts, self.device)

    def step(self, index: int) -> dict[str, float]:
        options = self.options
        pixels = self.pixels(index).to(self.device)
        shape = latent_shape(self.vae.z_dim, pixels)
        generator = noise_stream(self.device, options.seed, index, 1)
        noise = torch.randn(shape, generator=generator, device=self.device)
        loss, error = self.replay(self._loss, pixels, noise)
        self.learner.update(index, warm_cosine(index, options.steps))
        return {"loss": loss.item(), "dB": decibel(error.item())}

    def _loss(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with mixed_precision(self.device):
            with torch.no_grad():
                latents = self.vae.encode(pixels)
            decoded = self.vae.decode(latents + self.options.noise * noise).float()
        error, loss = reconstruction_loss(decoded, pixels, self.options.edges)
        return loss, error

    def finished(self) -> WanVAE:
        """Return the VAE with the averaged decoder."""
        vae = copy.deepcopy(self.vae)
        decoder, conv2 = self.learner.average
        vae.decoder.load_state_dict(decoder.state_dict())
        vae.conv2.load_state_dict(conv2.state_dict())
        return vae.cpu()

    def show(self, folder: Path, index: int) -> dict[str, float]:
        return show_vae(self.finished().to(self.device), folder, index)


def decoder_pixels(options: DecoderOptions, index: int) -> Tensor:
    """Draw a step's pixels [B, 3, F, H, W]."""
    rng = stream(options.seed, index, 0)
    seeds = rng.integers(1 << 40, size=options.batch).tolist()
    if index < options.crop_share * options.steps:
        crops = [
            crop_of(sample_scene(seed), options.frames, options.crop, rng)[0] for seed in seeds
        ]
        return torch.stack(crops)
    return clip_batch(seeds, frames=options.frames)[0]


def reconstruction_loss(decoded: Tensor, pixels: Tensor, edges: float) -> tuple[Tensor, Tensor]:
    """Return the mean squared error and the loss: 3 · error + `edges` · L1 of pixel differences."""
    error = F.mse_loss(decoded, pixels)
    steps = sum(F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis)) for axis in (3, 4)) / 2
    return error, 3 * error + edges * steps


def decibel(error: float) -> float:
    """Convert a mean squared error of pixels in [-1, 1] to PSNR."""
    return 10 * math.log10(4 / error)


@torch.no_grad()
def show_vae(vae: WanVAE, folder: Path, index: int) -> dict[str, float]:
    """Score reconstruction and legibility on held-out clips; draw truth over reconstruction."""
    device = vae.conv1.weight.device
    scores, frames, latents, facts = [], [], [], []
    for seed in range(HELD_OUT):
        scene = shown(sample_scene(seed, "test"), 33)
        pixels, true = (tensor[None].to(device) for tensor in scene)
        latents.append(vae.encode(pixels))
        facts.append(true)
        if seed >= SHOWN:
            continue
        decoded = vae.decode(latents[-1]).clamp(-1, 1)
        scores.append(psnr(decoded, pixels))
        if seed < 4:
            frames += [*to_frames(pixels)[:32:4], *to_frames(decoded)[:32:4]]
    contact_sheet(frames, folder / f"sheet_{index:06d}.png", columns=8)
    shares = linear_shares(torch.cat(latents), torch.cat(facts))
    legible = {f"{name} R2": share for name, share in shares.items()}
    return {"psnr": float(np.mean(scores)), **legible}


@torch.no_grad()
def start_linear(vae: WanVAE) -> None:
    """Initialise with zero residual branches, a variance-preserving trunk, and zero biases.

    PyTorch's default shrinks the trunk's signal below its biases, and the decoder then outputs one
    colour for hundreds of steps. In time, downsampling starts as the mean of two frames and
    upsampling as a repetition of each.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.residual[-1].weight)
        elif isinstance(module, FrameAttention):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
            weight = module.time_conv.weight[..., 0, 0]
            same = torch.eye(weight.shape[1])
            weight.zero_()
            if isinstance(module, Downsample):
                weight[..., 1] = weight[..., 2] = same / 2
            else:
                weight[..., 2] = torch.cat((same, same))


@torch.no_grad()
def reconstruct(vae: WanVAE, pixels: Tensor) -> Tensor:
    """Encode and decode pixels [B, 3, F, H, W], in fp32."""
    return vae.decode(vae.encode(pixels)).clamp(-1, 1)


def psnr(decoded: Tensor, pixels: Tensor) -> float:
    """Return the PSNR of clips in [-1, 1], in dB over all elements."""
    return (10 * torch.log10(4 / (decoded - pixels).square().mean())).item()


@torch.no_grad()
def latent_statistics(vae: WanVAE, clips: int = 64, frames: int = 33) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [16] of training clips' raw latents."""
    means = [
        vae.moments(to_pixels(render(sample_scene(seed), frames))[None])[0] for seed in range(clips)
    ]
    latents = torch.cat(means)
    return latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
