"""Which shape a blob is, and how it is turned: its moments against those of the world's shapes,
drawn and found."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy import ndarray

from ..palette import GROUND_COLOURS, OBJECT_COLOURS
from ..render import Layer, draw, draw_ground
from ..shapes import SHAPES
from .segment import ORDERS, Blobs, find_backdrop, find_blobs

NAMES = tuple(SHAPES)
RADII = np.geomspace(4.5, 26, 16)  # pixels
BLURS = (0.0, 0.7, 1.4)  # of templates, in pixels: what a VAE's output looks like
SCALE = np.array(
    [0.03, 0.05, 0.05, 0.05, 0.08]
)  # of the features: spread, three harmonics, log of area
CANVAS = 96


@dataclass(frozen=True, slots=True)
class Templates:
    """Features of the drawn shapes, K of each: their signature, and their harmonics' phases when
    upright."""

    features: ndarray  # [6, K, 5]
    phase: ndarray  # [6], of the harmonic of the shape's symmetry, at angle 0


def features(blobs: Blobs) -> ndarray:
    """What does not change when a shape turns, in units of what tells two shapes apart: [B, 5]."""
    columns = [blobs.spread, *np.abs(blobs.harmonics).T, np.log(blobs.area)]
    return np.stack(columns, axis=1) / SCALE


def blur(frames: ndarray, sigma: float) -> ndarray:
    """Gaussian blur of uint8 frames [F, H, W, 3], in pixels; the edge is repeated."""
    if sigma <= 0:
        return frames
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    video = frames.astype(np.float32)
    for axis in (1, 2):
        length = video.shape[axis]
        padded = np.pad(
            video, [(reach, reach) if a == axis else (0, 0) for a in range(4)], mode="edge"
        )
        video = sum(
            w * padded.take(np.arange(length) + i, axis=axis) for i, w in enumerate(weights)
        )
    return np.round(video).astype(np.uint8)


@lru_cache(maxsize=1)
def templates() -> Templates:
    """Every shape at every radius, angle and blur, off the pixel grid, as the detector sees it."""
    ground = draw_ground(GROUND_COLOURS["black"], GROUND_COLOURS["black"], 0.5, CANVAS)
    turns = np.array([0.0, 0.3, 0.6])
    radius, angle = (grid.ravel() for grid in np.meshgrid(RADII, turns))
    position = 0.5 + np.stack([np.modf(radius * 7.3)[0], np.modf(radius * 3.1)[0]], axis=1) / CANVAS
    rows, phases = [], []
    for name in NAMES:
        layer = Layer(name, OBJECT_COLOURS["white"], position, radius / CANVAS, angle)
        sharp = draw(ground, [layer], len(radius))
        seen = [
            find_blobs(video, find_backdrop(video))
            for video in (blur(sharp, sigma) for sigma in BLURS)
        ]
        rows.append(np.concatenate([features(blobs) for blobs in seen]))
        order = SHAPES[name].symmetry
        upright = seen[0].harmonics[np.flatnonzero(angle == 0)[-1]]  # the largest at angle 0
        phases.append(np.angle(upright[ORDERS.index(order)]) if order else 0.0)
    return Templates(np.stack(rows), np.array(phases))


def shape_distances(blobs: Blobs) -> ndarray:
    """Distance of every blob to the nearest template of every shape, [B, 6]; 1 is about what tells
    shapes apart."""
    found = features(blobs)
    known = templates().features
    square = ((found[:, None, None] - known) ** 2).sum(axis=-1)
    return np.sqrt(square.min(axis=-1))


def angles(blobs: Blobs, shape: str) -> ndarray:
    """Angle of every blob if it is this shape, [B]: radians, modulo the shape's symmetry; 0 where
    none can be seen."""
    order = SHAPES[shape].symmetry
    if not order:
        return np.zeros(len(blobs.area))
    upright = templates().phase[NAMES.index(shape)]
    return (np.angle(blobs.harmonics[:, ORDERS.index(order)]) - upright) / order
