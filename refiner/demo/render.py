"""Render scenes, anti-aliased, all frames at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from .captions import Caption
from .palette import GROUND_COLOURS, OBJECT_COLOURS
from .scene import Scene, check_size
from .shapes import EDGE, SHAPES, Cover, cover
from .world import sample_scene


@dataclass(frozen=True, slots=True)
class Layer:
    """An object to draw: F frames, lengths in frame sides, the colour in 0–255."""

    shape: str
    colour: tuple[float, ...] | ndarray  # 3 values
    position: ndarray  # [F, 2], x and y
    radius: ndarray  # [F]; 0 where absent
    angle: ndarray  # [F]


def lower_share(split: float, size: int) -> ndarray:
    """Return the ground's lower tone's share of each pixel row, [size, 1] in 0–1, soft-edged."""
    share = np.clip(0.5 + (np.arange(size) + 0.5 - split * size) / (2 * EDGE), 0, 1)[:, None]
    return share * share * (3 - 2 * share)


def draw_ground(top: Sequence[float], bottom: Sequence[float], split: float, size: int) -> ndarray:
    """Return the ground's colour by row, float32 [size, 3] in 0–255; `split` in frame sides."""
    share = lower_share(split, size)
    return (np.asarray(top) * (1 - share) + np.asarray(bottom) * share).astype(np.float32)


def patches(layers: Sequence[Layer], size: int) -> list[Cover]:
    """Return each layer's coverage of a frame of this side."""
    return [cover(layer.shape, layer.position, layer.radius, layer.angle, size) for layer in layers]


def draw(
    ground: ndarray, layers: Sequence[Layer], frames: int, covered: Sequence[Cover] | None = None
) -> ndarray:
    """Draw layers over a ground [S, 3], the last in front: uint8 [F, S, S, 3].

    `covered` are the layers' patches, if known.
    """
    size = len(ground)
    rows = np.round(ground).astype(np.uint8)
    video = np.ascontiguousarray(np.broadcast_to(rows[None, :, None, :], (frames, size, size, 3)))
    if covered is None:
        covered = patches(layers, size)
    for layer, patch in zip(layers, covered, strict=True):
        under = video[patch.index].astype(np.float32)
        colour = np.asarray(layer.colour, dtype=np.float32)
        mixed = under + patch.alpha[..., None] * (colour - under)
        video[patch.index] = (mixed + 0.5).astype(np.uint8)
    return video


def layers(scene: Scene, time: ndarray) -> list[Layer]:
    """Return the layers of a scene's objects at these seconds, the farthest first."""
    drawn = []
    for body in sorted(scene.bodies, key=lambda body: -body.depth):
        path = body.path(time)
        colour = OBJECT_COLOURS[body.stated.colour]
        drawn.append(
            Layer(body.stated.shape, colour, path.position, body.radius * path.scale, path.angle)
        )
    return drawn


def render(scene: Scene, frames: int = 81, size: int | None = None) -> ndarray:
    """Render a scene's first frames, uint8 [F, H, W, 3], at `size` or the scene's size."""
    if frames < 1:
        raise ValueError(f"{frames} frames: ask for at least 1")
    size = size or scene.size
    check_size(size)
    return render_at(scene, scene.times(frames), size)


def render_at(scene: Scene, time: ndarray, size: int) -> ndarray:
    """Render a scene at these seconds [F]: uint8 [F, S, S, 3]."""
    return draw(_ground(scene, size), layers(scene, time), len(time))


@dataclass(frozen=True, slots=True)
class Parts:
    """A scene's video of side S, and its components."""

    video: ndarray  # uint8 [F, S, S, 3]
    shapes: ndarray  # float32 [6, F, S, S], visible coverage by shape, in the order of SHAPES
    colour: ndarray  # float32 [3, F, S, S] in 0–255, of the objects, times their coverage
    ground: ndarray  # float32 [3, F, S, S] in 0–255, also behind objects


def render_parts(scene: Scene, frames: int) -> Parts:
    """Render a scene's first frames at its size, with their components."""
    size, drawn = scene.size, layers(scene, scene.times(frames))
    covered = patches(drawn, size)
    shapes, colour = (np.zeros((n, frames, size, size), dtype=np.float32) for n in (len(SHAPES), 3))
    for layer, patch in zip(drawn, covered, strict=True):
        for hidden in (*shapes, *colour):
            hidden[patch.index] *= 1 - patch.alpha
        shapes[list(SHAPES).index(layer.shape)][patch.index] += patch.alpha
        for channel, value in zip(colour, layer.colour, strict=True):
            channel[patch.index] += value * patch.alpha
    rows = _ground(scene, size)
    ground = np.broadcast_to(rows.T[:, None, :, None], colour.shape)
    return Parts(draw(rows, drawn, frames, covered), shapes, colour, ground)


def _ground(scene: Scene, size: int) -> ndarray:
    top, bottom = (GROUND_COLOURS[tone] for tone in scene.ground.tones)
    return draw_ground(top, bottom, scene.ground.split, size)


def to_pixels(frames: ndarray) -> Tensor:
    """Convert uint8 frames [F, H, W, 3] to float32 [3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


def clip_batch(
    seeds: Sequence[int], split: str = "train", frames: int = 81, size: int = 64
) -> tuple[Tensor, list[Caption]]:
    """Render the seeds' clips, float32 [B, 3, F, H, W] in [-1, 1]; returns them with captions."""
    scenes = [sample_scene(seed, split, size) for seed in seeds]
    clips = [to_pixels(render(scene, frames)) for scene in scenes]
    return torch.stack(clips), [scene.caption for scene in scenes]
