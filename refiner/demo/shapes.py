"""The world's shapes as signed distance functions, and their coverage of pixels.

F frames, P side of the patch around a shape in pixels. Positions are in frame sides (0–1, x right,
y down), angles clockwise as seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

EDGE = 1.5  # width of an edge in pixels, at every frame size
# relative to the circumradius
STAR_INNER = 0.45
RING_INNER = 0.5
CROSS_ARM = 0.336  # half the width of an arm


def _circle(x: ndarray, y: ndarray) -> ndarray:
    return np.sqrt(x * x + y * y) - 1


def _ring(x: ndarray, y: ndarray) -> ndarray:
    middle, half = (1 + RING_INNER) / 2, (1 - RING_INNER) / 2
    return np.abs(np.sqrt(x * x + y * y) - middle) - half


def _square(x: ndarray, y: ndarray) -> ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - np.sqrt(0.5)


def _triangle(x: ndarray, y: ndarray) -> ndarray:
    return np.maximum(np.abs(x) * np.sqrt(0.75) - y * 0.5, y) - 0.5


def _cross(x: ndarray, y: ndarray) -> ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.sqrt(1 - CROSS_ARM**2), np.minimum(x, y) - CROSS_ARM)


def _star(x: ndarray, y: ndarray) -> ndarray:
    """Fold into a tenth of the plane, where the star is a half-plane; its first point is up."""
    x, y = np.abs(x), -y
    for side in (1, -1):
        nx, ny = side * np.cos(np.pi / 5), -np.sin(np.pi / 5)
        beyond = 2 * np.maximum(x * nx + y * ny, 0)
        x, y = x - beyond * nx, y - beyond * ny
    inner_x, inner_y = STAR_INNER * np.sin(np.pi / 5), STAR_INNER * np.cos(np.pi / 5)
    nx, ny = 1 - inner_y, inner_x  # normal of the edge from (0, 1) to the inner corner
    return (np.abs(x) * nx + (y - 1) * ny) / np.hypot(nx, ny)


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape: distance function, proportions, and rotational symmetry."""

    distance: Callable[[ndarray, ndarray], ndarray]  # at circumradius 1
    reach: float  # circumradius / radius, so that shapes of one radius look about equally large
    symmetry: int  # looks the same after turns by 360° / symmetry; 0: after any turn
    area: float  # at radius 1


_INNER = STAR_INNER * np.sin(np.pi / 5)
_ARM = CROSS_ARM * np.sqrt(1 - CROSS_ARM**2)
# fmt: off
SHAPES: dict[str, Shape] = {
    "circle":   Shape(_circle,   1.00, 0, np.pi),
    "square":   Shape(_square,   1.22, 4, 1.22**2 * 2),
    "triangle": Shape(_triangle, 1.38, 3, 1.38**2 * 0.75 * np.sqrt(3)),
    "star":     Shape(_star,     1.38, 5, 1.38**2 * 5 * _INNER),
    "cross":    Shape(_cross,    1.25, 4, 1.25**2 * (8 * _ARM - 4 * CROSS_ARM**2)),
    "ring":     Shape(_ring,     1.12, 0, 1.12**2 * np.pi * (1 - RING_INNER**2)),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Cover:
    """A shape's coverage of a patch of pixels, and the patch's place in the frame."""

    alpha: ndarray  # [F, P, P] in 0–1, float32
    rows: ndarray  # [F, P], frame rows of the patch
    columns: ndarray  # [F, P]

    @property
    def index(self) -> tuple[ndarray, ndarray, ndarray]:
        """Index of the patch in [F, H, W, …] frames."""
        frames = np.arange(len(self.alpha))[:, None, None]
        return frames, self.rows[:, :, None], self.columns[:, None, :]


def cover(shape: str, position: ndarray, radius: ndarray, angle: ndarray, size: int) -> Cover:
    """Compute a shape's coverage by frame from `position` [F, 2], `radius` [F] and `angle` [F]."""
    kind = SHAPES[shape]
    reach = np.maximum(radius * kind.reach * size, 1e-3).astype(np.float32)[:, None, None]
    side = min(size, 2 * int(np.ceil(reach.max() + EDGE)) + 2)
    centre = position * size
    corner = np.clip(np.round(centre).astype(np.int64) - side // 2, 0, size - side)
    grid = np.arange(side)
    offset = (corner[:, :, None] + grid + 0.5 - centre[:, :, None]).astype(np.float32)
    x, y = offset[:, 0, None, :] / reach, offset[:, 1, :, None] / reach
    if angle.any():
        cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        x, y = cos * x + sin * y, cos * y - sin * x
    distance = kind.distance(x, y) * reach
    alpha = np.clip(0.5 - distance * np.float32(1 / EDGE), 0, 1)
    alpha = alpha * alpha * (3 - 2 * alpha)
    return Cover(alpha.astype(np.float32), corner[:, 1, None] + grid, corner[:, 0, None] + grid)
