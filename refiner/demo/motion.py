"""Motions of the world's objects, in closed form over time, so that clips can have any length.

Lengths are in frame sides, times in seconds, angles in radians and clockwise as seen; y points
down.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

FPS = 16
WALL = 1.5 / 64  # gap between a bouncing object and the frame's edge

DIRECTIONS: dict[str, tuple[str, ...]] = {
    "bounce": ("left", "right", "up", "down", "up left", "up right", "down left", "down right"),
    "orbit": ("clockwise", "counterclockwise"),
    "swing": ("horizontal", "vertical"),
    "pulse": (),
    "spin": ("clockwise", "counterclockwise"),
    "still": (),
}
# Ranges of slow and fast: frame sides per second for bounce, else periods or turns per second.
RATES: dict[str, dict[str, tuple[float, float]]] = {
    "bounce": {"slow": (0.15, 0.18), "fast": (0.40, 0.47)},
    "orbit": {"slow": (0.20, 0.24), "fast": (0.46, 0.55)},
    "swing": {"slow": (0.24, 0.29), "fast": (0.56, 0.68)},
    "pulse": {"slow": (0.27, 0.33), "fast": (0.62, 0.75)},
    "spin": {"slow": (0.11, 0.15), "fast": (0.34, 0.42)},
}
REACH: dict[str, tuple[float, float]] = {
    "orbit": (0.13, 0.20),
    "swing": (0.13, 0.20),
    "pulse": (0.28, 0.34),
}


@dataclass(frozen=True, slots=True)
class Motion:
    """A motion: its kind, visible attributes (direction, speed), and parameters."""

    kind: str
    direction: str | None = None
    speed: str | None = None
    rate: float = 0.0  # frame sides per second for bounce, else periods or turns per second
    reach: float = 0.0  # radius of an orbit, amplitude of a swing, relative growth of a pulse
    phase: float = 0.0  # of orbit, swing and pulse at time 0; offset of a bounce's heading


@dataclass(frozen=True, slots=True)
class Path:
    """An object's trajectory."""

    position: ndarray  # [F, 2], x and y
    scale: ndarray  # [F], factor on the radius
    angle: ndarray  # [F]


def heading(direction: str) -> tuple[int, int]:
    """Return the signs of x and y of a bounce's direction."""
    words = direction.split()
    return ("right" in words) - ("left" in words), ("down" in words) - ("up" in words)


def _fold(place: ndarray, low: float, high: float) -> ndarray:
    """Reflect values at the ends of [low, high]."""
    turns = np.mod((place - low) / (high - low), 2)
    return low + (high - low) * (1 - np.abs(turns - 1))


def _bounce(motion: Motion, centre: tuple[float, float], reach: float, time: ndarray) -> ndarray:
    dx, dy = heading(motion.direction or "right")
    angle = np.arctan2(dy, dx) + motion.phase
    speeds = motion.rate * np.cos(angle) * (dx != 0), motion.rate * np.sin(angle) * (dy != 0)
    low = reach + WALL
    return np.stack(
        [_fold(c + v * time, low, 1 - low) for c, v in zip(centre, speeds, strict=True)], axis=1
    )


def follow(
    motion: Motion, centre: tuple[float, float], reach: float, angle: float, time: ndarray
) -> Path:
    """Return an object's path at the times [F].

    `centre` is a bounce's start or any other motion's centre, `reach` the object's circumradius,
    `angle` its angle at time 0.
    """
    position = np.broadcast_to(np.array(centre), (len(time), 2)).copy()
    scale, angles = np.ones(len(time)), np.full(len(time), angle)
    sign = -1 if motion.direction == "counterclockwise" else 1
    turn = motion.phase + 2 * np.pi * motion.rate * time * sign
    if motion.kind == "bounce":
        position = _bounce(motion, centre, reach, time)
    elif motion.kind == "orbit":
        position += motion.reach * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    elif motion.kind == "swing":
        position[:, int(motion.direction == "vertical")] += motion.reach * np.sin(turn)
    elif motion.kind == "pulse":
        scale += motion.reach * np.sin(turn)
    elif motion.kind == "spin":
        angles += turn
    return Path(position, scale, angles)


def extent(
    motion: Motion, centre: tuple[float, float], reach: float
) -> tuple[tuple[float, float], ...]:
    """Return the ranges (from, to) along x and y that the object ever covers."""
    spans = []
    for axis, place in enumerate(centre):
        low, high = place - reach, place + reach
        if motion.kind == "bounce" and heading(motion.direction or "right")[axis]:
            low, high = WALL, 1 - WALL
        elif motion.kind == "orbit" or (
            motion.kind == "swing" and (motion.direction == "vertical") == bool(axis)
        ):
            low, high = low - motion.reach, high + motion.reach
        elif motion.kind == "pulse":
            low, high = place - reach * (1 + motion.reach), place + reach * (1 + motion.reach)
        spans.append((low, high))
    return tuple(spans)
