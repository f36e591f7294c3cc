"""Single frames of a video, decoded with a graph: as much of the VAE's backward pass as a reward
looks at."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ...wan.vae import DecoderState, WanVAE

CONTEXT = 4  # latents decoded before a wanted one, without a graph


def latent_of(frame: int) -> int:
    """The latent that a pixel frame is decoded from: one for the first, then one for four."""
    return (frame + 3) // 4


def decode_frames(
    vae: WanVAE, latents: Tensor, numbers: Sequence[int], context: int = CONTEXT
) -> Tensor:
    """Pixel frames `numbers` (rising) of latents [B, C, F, h, w]: [B, len(numbers), 3, H, W] in
    0–1, clamped.

    Only the latents that they are decoded from have a graph. `context` latents before each of them
    (1 or more) are decoded besides, for what the causal VAE remembers; with all of them the pixels
    are those of a whole decode.
    """
    wanted = {latent_of(number) for number in numbers}
    needed = {place for one in wanted for place in range(max(0, one - context), one + 1)}
    found: dict[int, Tensor] = {}
    state, after = DecoderState(), 0
    for is_wanted, run in groupby(sorted(needed), lambda place: place in wanted):
        for first, last in unbroken(list(run)):
            if first != after:
                state = DecoderState()
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_wanted):
                pixels = vae.decode(latents[:, :, first : last + 1], state)
            if is_wanted:
                end = 4 * last + 1
                found |= dict(zip(range(end - pixels.shape[2], end), pixels.unbind(2), strict=True))
            after = last + 1
    return ((torch.stack([found[number] for number in numbers], dim=1) + 1) / 2).clamp(0, 1)


def unbroken(places: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive integers."""
    runs = groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    ends = ([place for _, place in run] for _, run in runs)
    return [(run[0], run[-1]) for run in ends]
