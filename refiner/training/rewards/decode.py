"""Decode single frames of a video with gradients, for rewards that look at few frames."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ...wan.vae import DecoderState, WanVAE

CONTEXT = 4  # latents decoded without a graph before each wanted one


def latent_of(frame: int) -> int:
    """Return the latent that holds a pixel frame: one for the first, then one for every four."""
    return (frame + 3) // 4


def decode_frames(
    vae: WanVAE, latents: Tensor, numbers: Sequence[int], context: int = CONTEXT
) -> Tensor:
    """Decode pixel frames `numbers` (rising) of latents [B, C, F, h, w].

    Returns [B, len(numbers), 3, H, W], clamped to 0–1. Only the latents that hold these frames have
    a graph. `context` latents (1 or more) before each are decoded, too, to fill the causal VAE's
    caches; with all of them the pixels equal those of a whole decode.
    """
    wanted = {latent_of(number) for number in numbers}
    needed = {place for one in wanted for place in range(max(0, one - context), one + 1)}
    by_number: dict[int, Tensor] = {}
    state, after = DecoderState(), 0
    for is_wanted, run in groupby(sorted(needed), lambda place: place in wanted):
        for first, last in unbroken(list(run)):
            if first != after:
                state = DecoderState()
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_wanted):
                pixels = vae.decode(latents[:, :, first : last + 1], state)
            if is_wanted:
                end = 4 * last + 1
                run_numbers = range(end - pixels.shape[2], end)
                by_number |= dict(zip(run_numbers, pixels.unbind(2), strict=True))
            after = last + 1
    frames = torch.stack([by_number[number] for number in numbers], dim=1)
    return ((frames + 1) / 2).clamp(0, 1)


def unbroken(places: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last of each run of consecutive integers."""
    runs = groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    ends = ([place for _, place in run] for _, run in runs)
    return [(run[0], run[-1]) for run in ends]
