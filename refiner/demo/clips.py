"""Clips of captions: by student or teacher, rendered by the world, or through the VAE and back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm

from ..memory.whole import WholeClip
from ..noise.refiner import Refiner
from ..pictures import contact_sheet
from ..sample import RunPlan, sample
from ..samplers import Method, self_forcing
from ..schedule import PRESETS, Preset
from ..stopping import ignore_in_worker
from ..training.dmd import shifted
from ..training.learner import noise_stream
from ..training.precision import mixed_precision
from ..video import to_frames
from ..wan.causal import CausalWan
from ..wan.vae import WanVAE
from .captions import Caption
from .metrics.evaluate import ClipScores, evaluate_clip
from .metrics.table import summarise
from .render import clip_batch, render
from .world import sample_scene

Encode = Callable[[list[str]], Tensor]  # prompts -> contexts [B, L, text_dim]
PRESET = PRESETS["self-forcing"]
LATENT_FRAMES, SIDE = 21, 8  # 81 frames of 64x64
BATCH = 16
DECODED_AT_ONCE = {"cpu": 4, "cuda": 16}
SHOWN = 4  # clips per sheet


def held_out(count: int, split: str = "test", first: int = 0) -> list[Caption]:
    """Return captions of a split that no model was trained on, starting with number `first`."""
    return [sample_scene(seed, split).caption for seed in range(first, first + count)]


def held_out_prompts(count: int) -> list[str]:
    """Return the texts of the first held-out captions."""
    return [caption.text for caption in held_out(count)]


def training_prompts(count: int) -> list[str]:
    """Return the texts of the first training captions."""
    return [sample_scene(seed).caption.text for seed in range(count)]


def batched(captions: Iterable[Caption], size: int = BATCH) -> Iterator[list[str]]:
    """Yield the captions' texts, `size` at a time."""
    rest = iter(captions)
    while texts := [caption.text for caption in islice(rest, size)]:
        yield texts


@torch.no_grad()
def decoded(vae: WanVAE, latents: Tensor) -> Iterator[ndarray]:
    """Decode latents [B, 16, F, h, w] to uint8 clips [F, H, W, 3]."""
    at_once = DECODED_AT_ONCE.get(latents.device.type, DECODED_AT_ONCE["cpu"])
    for batch in latents.split(at_once):
        yield from (to_frames(pixels[None]) for pixels in vae.decode(batch))


@torch.no_grad()
def student_clips(
    student: CausalWan, text: Encode, vae: WanVAE, captions: Sequence[Caption], *, seed: int = 0,
    method_of: Callable[[list[str]], Method] = lambda texts: self_forcing(),
    preset: Preset = PRESET, frames: int = LATENT_FRAMES, refiner: Refiner | None = None,
) -> Iterator[ndarray]:  # fmt: skip
    """Sample a clip of each caption, by `method_of` its batch's texts.

    A clip's noise depends on the seed, its place in the list and the length.
    """
    for number, texts in enumerate(batched(captions)):
        plan = RunPlan(preset, frames, SIDE, SIDE, batch=len(texts))
        method, noise = method_of(texts), seed * 1_000_003 + number
        chunks = sample(student, text(texts), plan, seed=noise, method=method, refiner=refiner)
        yield from decoded(vae, torch.cat(list(chunks), dim=2))


@torch.no_grad()
def teacher_clips(
    teacher: CausalWan, text: Encode, vae: WanVAE, captions: Sequence[Caption], *, seed: int = 0,
    steps: int = 50,
) -> Iterator[ndarray]:  # fmt: skip
    """Sample a clip of each caption."""
    device = next(teacher.model.parameters()).device
    for number, texts in enumerate(batched(captions)):
        with mixed_precision(device):
            latents = sample_teacher(
                teacher, text, texts, LATENT_FRAMES, steps=steps, seed=seed * 1_000_003 + number,
                size=(SIDE, SIDE),
            )  # fmt: skip
        yield from decoded(vae, latents.float())


def truth_clips(
    captions: Sequence[Caption], frames: int = 81, split: str = "test"
) -> Iterator[ndarray]:
    """Render the first scenes of a split, as many as there are captions."""
    return (render(sample_scene(seed, split), frames) for seed in range(len(captions)))


@torch.no_grad()
def returned_clips(vae: WanVAE, captions: Sequence[Caption], frames: int = 81) -> Iterator[ndarray]:
    """Encode and decode the clips of truth_clips: the VAE's upper bound for any sampler."""
    device = vae.conv1.weight.device
    for seed in range(len(captions)):
        pixels, _ = clip_batch([seed], "test", frames)
        yield from decoded(vae, vae.encode(pixels.to(device)))


def score(
    clips: Iterable[ndarray], captions: Sequence[Caption], title: str = "", workers: int = 0
) -> list[ClipScores]:
    """Score each clip against its caption, in `workers` processes or in this one.

    With a title, show a progress bar.
    """
    pairs, count = zip(clips, captions, strict=True), len(captions)
    bar = tqdm(pairs, title, count, unit="clip", disable=not title, dynamic_ncols=True)
    if not workers:
        return [evaluate_clip(clip, caption) for clip, caption in bar]
    with ProcessPoolExecutor(workers, get_context("spawn"), ignore_in_worker) as pool:
        jobs = [pool.submit(evaluate_clip, clip, caption) for clip, caption in bar]
        return [job.result() for job in jobs]


def show_clips(
    clips: Iterable[ndarray],
    captions: Sequence[Caption],
    folder: Path,
    index: int,
    before: Sequence[ndarray] = (),
) -> dict[str, float]:
    """Score clips; write a sheet of the first four, eight frames each, and their captions.

    Clips `before` get a row each above the clips'.
    """
    clips = list(clips)
    rows = (
        [row for pair in zip(before, clips[:SHOWN], strict=False) for row in pair]
        if before
        else clips[:SHOWN]
    )
    frames = [frame for clip in rows for frame in clip[:: len(clip) // 8][:8]]
    contact_sheet(frames, folder / f"sheet_{index:06d}.png")
    (folder / f"sheet_{index:06d}.txt").write_text(
        "\n".join(caption.text for caption in captions[:SHOWN]) + "\n"
    )
    summary = summarise(score(clips, captions))
    return {name: summary[name].mean for name in ("object", "colour", "action", "quality", "total")}


@torch.no_grad()
def sample_teacher(
    network: CausalWan, text: Encode, prompts: Sequence[str], frames: int, *, steps: int = 50,
    guidance: float = 1.0, shift: float = 5.0, seed: int = 0, size: tuple[int, int] = (8, 8),
) -> Tensor:  # fmt: skip
    """Sample whole clips [B, 16, F, h, w] by Euler steps along the guided flow.

    The flow is `uncond + (1 + w) (cond − uncond)` with guidance w.
    """
    device = next(network.model.parameters()).device
    generator = noise_stream(device, seed)
    x = torch.randn(
        len(prompts), network.config.in_dim, frames, *size, generator=generator, device=device
    )
    texts = [network.text(text([*prompts])), network.text(text([""] * len(prompts)))]
    sigmas = shifted(torch.linspace(1, 0, steps + 1), shift).tolist()
    for sigma, below in pairwise(sigmas):
        t = torch.full((1, 1), 1000 * sigma, dtype=torch.float64)
        with_prompt, without = (network(x, t, each, WholeClip(frames)) for each in texts)
        x = x + (below - sigma) * (with_prompt + guidance * (with_prompt - without))
    return x
