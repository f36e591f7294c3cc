"""Encode what a run starts from besides noise: given frames, or the frames of another clip."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..refiner.estimate import check_room
from ..refiner.run_plan import RunPlan
from ..refiner.schedule import Preset
from ..refiner.wan.vae import normalized
from .api import host
from .run import video_latents

PIXEL_BYTES = 40  # a colour value while a clip is read, scaled and encoded
PIECE = 16  # frames scaled together


def start_latents(
    start: Any, vae: Any, height: int | None = None, width: int | None = None
) -> dict | None:
    """Return `start` as a LATENT: an IMAGE is scaled to the clip's latent size and encoded.

    Without a size it keeps its own, cut to multiples of 16 pixels.

    Raises ValueError for images without a VAE, or of a number that no clip has.
    """
    if start is None or isinstance(start, dict):
        return start
    frames = len(start)
    if (frames - 1) % 4:
        raise ValueError(
            f"start holds {frames} images: give 1, or 1 + 4n frames of a video that goes on"
        )
    rows, columns = (max(2, side // 16 * 2) for side in start.shape[1:3])
    return {"samples": encoded(start, "start", vae, height or rows, width or columns)}


def started_at(preset: Preset, level: int) -> Preset:
    """Return the preset from this nominal level on; ValueError lists its levels."""
    if level not in preset.all_levels:
        listed = ", ".join(map(str, preset.all_levels))
        raise ValueError(f"start_level {level}: this run has the levels {listed}, choose one")
    levels, first_levels = (
        tuple(step for step in steps if step <= level)
        for steps in (preset.levels, preset.first_levels)
    )
    if not levels or (preset.first_levels and not first_levels):
        listed = ", ".join(map(str, preset.levels))
        raise ValueError(
            f"start_level {level} leaves chunks without a level (theirs are {listed}): choose a"
            " higher one"
        )
    return preset.changed(levels=levels, first_levels=first_levels)


def check_source(video: Any, vae: Any, frames: int) -> None:
    """Raise ValueError for a clip with fewer pixel frames than the run, or without a VAE."""
    count = host.clip_size(video)[0]
    if count < frames:
        raise ValueError(
            f"start_video has {count} frames and the clip {frames}: give a longer video, or set a"
            f" length of at most {count - (count - 1) % 4}"
        )
    check_vae(vae, "start_video")


def source_latents(video: Any, vae: Any, plan: RunPlan) -> Tensor:
    """Return the normalised latents [B, C, F, h, w] of the frames that a run starts from.

    They are scaled to cover the clip's size and cut at the centre. Raises ValueError as
    `check_source` does.
    """
    frames = 4 * (plan.given + plan.frames) - 3
    check_source(video, vae, frames)
    total, width, height = host.clip_size(video)
    nbytes = PIXEL_BYTES * (total * width * height + 64 * frames * plan.width * plan.height)
    check_room(nbytes, "encoding start_video", "use a shorter or smaller video")
    images = video
    if not isinstance(video, Tensor):
        images = torch.from_numpy(host.clip_frames(video, 16)[0][:frames]).float() / 255
    raw = encoded(images[:frames], "start_video", vae, plan.height, plan.width)
    return normalized(raw.float()).expand(plan.batch, -1, -1, -1, -1).contiguous()


def encoded(images_FHWC: Tensor, name: str, vae: Any, height: int, width: int) -> Tensor:
    """Encode frames in [0, 1] to raw latents [1, 16, f, height, width]."""
    check_vae(vae, name)
    raw = host.encode(vae, covering(images_FHWC[..., :3], 8 * width, 8 * height))
    return video_latents({"samples": raw}, name)


def check_vae(vae: Any, name: str) -> None:
    """Raise ValueError without a VAE."""
    if vae is None:
        raise ValueError(f"{name} holds frames, which must be encoded: connect Wan2.1's VAE to vae")


def covering(images_FHWC: Tensor, width: int, height: int) -> Tensor:
    """Scale frames until they cover a size in pixels, and cut what stands over evenly."""
    rows, columns = images_FHWC.shape[1:3]
    if (rows, columns) == (height, width):
        return images_FHWC
    scale = max(height / rows, width / columns)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pieces = []
    for piece in images_FHWC.permute(0, 3, 1, 2).split(PIECE):
        scaled = F.interpolate(piece.float(), size=size, mode="bicubic", antialias=True)
        pieces.append(scaled[:, :, top : top + height, left : left + width].clamp(0, 1))
    return torch.cat(pieces).permute(0, 2, 3, 1)
