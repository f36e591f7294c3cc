"""A scene of the synthetic world: objects, ground, caption, and every frame's ground truth.

A scene is in closed form over time: it has no length, and its truth exists for any frame.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .captions import Caption, Stated
from .motion import FPS, Motion, Path, extent, follow
from .palette import GROUNDS
from .shapes import SHAPES, cover


def check_size(size: int) -> None:
    """Raise ValueError unless the world can be drawn at this frame side."""
    if size % 8 or not 32 <= size <= 128:
        raise ValueError(f"a frame side of {size}: use a multiple of 8 from 32 to 128")


@dataclass(frozen=True, slots=True)
class Body:
    """An object: its attributes, geometry (frame sides, radians), and depth (0 is in front)."""

    stated: Stated  # all visible attributes, stated in the caption or not
    radius: float
    centre: tuple[float, float]  # of the motion; a bounce's start
    angle: float
    motion: Motion
    depth: int = 0

    @property
    def reach(self) -> float:
        """The circumradius."""
        return self.radius * SHAPES[self.stated.shape].reach

    @property
    def extent(self) -> tuple[tuple[float, float], ...]:
        return extent(self.motion, self.centre, self.reach)

    def path(self, time: ndarray) -> Path:
        return follow(self.motion, self.centre, self.reach, self.angle, time)


@dataclass(frozen=True, slots=True)
class Ground:
    """Two tones, which may be equal, and the end of the upper one in frame sides from the top."""

    name: str
    split: float

    @property
    def tones(self) -> tuple[str, str]:
        return GROUNDS[self.name]


@dataclass(frozen=True, slots=True)
class Truth:
    """The ground truth by frame; F frames, N objects in the order of the caption."""

    shape: tuple[str, ...]
    colour: tuple[str, ...]
    depth: tuple[int, ...]  # 0 is in front
    position: ndarray  # [F, N, 2], x and y in frame sides, y down
    radius: ndarray  # [F, N], in frame sides
    angle: ndarray  # [F, N], radians, clockwise as seen
    visible: ndarray  # [F, N], fraction of the object that no other hides


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene: its objects, ground and caption; `size` is the default frame side."""

    seed: int
    split: str
    size: int
    bodies: tuple[Body, ...]
    ground: Ground
    caption: Caption

    def times(self, frames: int) -> ndarray:
        """Return the times of the first frames in seconds."""
        return np.arange(frames) / FPS

    def truth(self, frames: int) -> Truth:
        """Return the ground truth of the first frames."""
        time = self.times(frames)
        paths = [body.path(time) for body in self.bodies]
        radii = [body.radius * path.scale for body, path in zip(self.bodies, paths, strict=True)]
        return Truth(
            shape=tuple(body.stated.shape for body in self.bodies),
            colour=tuple(body.stated.colour for body in self.bodies),
            depth=tuple(body.depth for body in self.bodies),
            position=np.stack([path.position for path in paths], axis=1),
            radius=np.stack(radii, axis=1),
            angle=np.stack([path.angle for path in paths], axis=1),
            visible=np.stack([self._visible(index, paths) for index in range(len(paths))], axis=1),
        )

    def _visible(self, index: int, paths: list[Path], size: int = 64) -> ndarray:
        """Return the fraction of an object that is not hidden, by frame."""
        hiding = [i for i, body in enumerate(self.bodies) if body.depth < self.bodies[index].depth]
        if not hiding:
            return np.ones(len(paths[index].scale))
        layers = {}
        for i in (index, *hiding):
            body, path = self.bodies[i], paths[i]
            patch = cover(
                body.stated.shape, path.position, body.radius * path.scale, path.angle, size
            )
            layers[i] = np.zeros((len(path.scale), size, size), dtype=np.float32)
            layers[i][patch.index] = patch.alpha
        left = np.prod([1 - layers[i] for i in hiding], axis=0)
        return (layers[index] * left).sum(axis=(1, 2)) / layers[index].sum(axis=(1, 2))
