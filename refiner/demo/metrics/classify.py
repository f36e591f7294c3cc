"""Classify a blob's shape and angle by comparing its moments with rendered templates."""

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
BLURS = (0.0, 0.7, 1.4)  # of the templates, in pixels, like a VAE's output
# units of the features: spread, three harmonics, log of area
SCALE = np.array([0.03, 0.05, 0.05, 0.05, 0.08])
CANVAS = 96


@dataclass(frozen=True, slots=True)
class Templates:
    """Features of K renderings of each shape, and the phases of the upright shapes' harmonics."""

    features: ndarray  # [6, K, 5]
    phase: ndarray  # [6], of the harmonic of the shape's symmetry, at angle 0


def features(blobs: Blobs) -> ndarray:
    """Return rotation-invariant features [B, 5]; 1 about separates two shapes."""
    columns = [blobs.spread, *np.abs(blobs.harmonics).T, np.log(blobs.area)]
    return np.stack(columns, axis=1) / SCALE


def blur(frames: ndarray, sigma: float) -> ndarray:
    """Blur uint8 frames [F, H, W, 3] with a Gaussian of `sigma` pixels and repeated edges."""
    if sigma <= 0:
        return frames
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    video = frames.astype(np.float32)
    for axis in (1, 2):
        places = np.arange(video.shape[axis])
        widths = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(video, widths, mode="edge")
        video = sum(w * padded.take(places + i, axis=axis) for i, w in enumerate(weights))
    return np.round(video).astype(np.uint8)


@lru_cache(maxsize=1)
def templates() -> Templates:
    """Detect every shape at every radius, angle and blur, off the pixel grid."""
    ground = draw_ground(GROUND_COLOURS["black"], GROUND_COLOURS["black"], 0.5, CANVAS)
    turns = np.array([0.0, 0.3, 0.6])
    radius, angle = (grid.ravel() for grid in np.meshgrid(RADII, turns))
    position = 0.5 + np.stack([np.modf(radius * 7.3)[0], np.modf(radius * 3.1)[0]], axis=1) / CANVAS
    rows, phases = [], []
    for name in NAMES:
        layer = Layer(name, OBJECT_COLOURS["white"], position, radius / CANVAS, angle)
        sharp = draw(ground, [layer], len(radius))
        videos = [blur(sharp, sigma) for sigma in BLURS]
        seen = [find_blobs(video, find_backdrop(video)) for video in videos]
        rows.append(np.concatenate([features(blobs) for blobs in seen]))
        order = SHAPES[name].symmetry
        upright = seen[0].harmonics[np.flatnonzero(angle == 0)[-1]]  # the largest at angle 0
        phases.append(np.angle(upright[ORDERS.index(order)]) if order else 0.0)
    return Templates(np.stack(rows), np.array(phases))


def shape_distances(blobs: Blobs) -> ndarray:
    """Return every blob's distance to each shape's nearest template [B, 6], in features' units."""
    measured = features(blobs)
    known = templates().features
    square = ((measured[:, None, None] - known) ** 2).sum(axis=-1)
    return np.sqrt(square.min(axis=-1))


def angles(blobs: Blobs, shape: str) -> ndarray:
    """Return every blob's angle [B] as this shape: radians modulo its symmetry, 0 without one."""
    order = SHAPES[shape].symmetry
    if not order:
        return np.zeros(len(blobs.area))
    upright = templates().phase[NAMES.index(shape)]
    return (np.angle(blobs.harmonics[:, ORDERS.index(order)]) - upright) / order
