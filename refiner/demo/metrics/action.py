"""Classify a track's motion, its direction and speed, by where it turns and how often."""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from ..motion import FPS, RATES, WALL
from ..shapes import SHAPES
from .track import Track

# Thresholds, lengths in frame sides.
MOVES = 5 / 64  # extent of a path from which an object moves
TURNS = 3 / 64  # distance to come back by, to count as a turn
AT_WALL = 3 / 64  # largest distance from a wall at which a turn is a bounce
GROWS = 0.25  # range of the radius, relative to its median, from which an object pulses
SPINS = 0.05  # turns per second
ROUND = 0.4  # width of a path relative to its length, from which it is an orbit
FIT = 0.6  # share of the variance that a regular motion explains
FREQUENCIES = np.arange(0.10, 1.30, 0.01)  # Hz
OTHER = "other"  # a motion that no caption states


@dataclass(frozen=True, slots=True)
class Action:
    """A detected motion; direction and speed are None if the kind has none."""

    kind: str
    direction: str | None = None
    speed: str | None = None


def speed_class(kind: str, rate: float) -> str:
    """Return slow or fast, split at the geometric mean of the world's two ranges."""
    return "fast" if rate > np.sqrt(RATES[kind]["slow"][1] * RATES[kind]["fast"][0]) else "slow"


def turns(values: ndarray, least: float) -> list[int]:
    """Return the indices of extrema after which the values come back by at least `least`."""
    extrema, best, way = [], 0, 0
    for index, value in enumerate(values):
        gain = (value - values[best]) * (way or 1)
        if way == 0 and abs(gain) > least:
            best, way = index, int(np.sign(gain))
        elif way and gain > 0:
            best = index
        elif way and gain < -least:
            extrema.append(best)
            best, way = index, -way
    return extrema


def rhythm(time: ndarray, values: ndarray) -> tuple[float, float]:
    """Return the frequency that fits values [T, k] best, and the explained share of variance."""
    wave = 2 * np.pi * FREQUENCIES[:, None] * time
    # [frequencies, T, 3]
    design = np.stack([np.ones_like(wave), np.cos(wave), np.sin(wave)], axis=-1)
    square = design.transpose(0, 2, 1) @ design + 1e-6 * np.eye(3)
    fitted = design @ np.linalg.solve(square, design.transpose(0, 2, 1) @ values)
    left = ((fitted - values) ** 2).sum(axis=(1, 2))
    best = int(left.argmin())
    total = ((values - values.mean(axis=0)) ** 2).sum()
    return float(FREQUENCIES[best]), float(1 - left[best] / max(total, 1e-12))


def see_action(track: Track) -> Action:
    """Classify a track's motion from the frames where its position is known."""
    time = np.flatnonzero(track.known) / FPS
    place, radius, angle = (
        values[track.known] for values in (track.position, track.radius, track.angle)
    )
    if len(time) < 8:
        return Action(OTHER)
    if np.ptp(_smooth(place), axis=0).max() >= MOVES:
        return _way(time, place, float(np.median(radius)) * SHAPES[track.shape].reach)
    low, high = np.quantile(radius, (0.03, 0.97))
    if high - low >= GROWS * np.median(radius):
        frequency, fit = rhythm(time, radius[:, None])
        pulse = Action("pulse", None, speed_class("pulse", frequency))
        return pulse if fit > FIT else Action(OTHER)
    slope = np.polyfit(time, angle, 1)[0] / (2 * np.pi)
    if abs(slope) >= SPINS and np.corrcoef(time, angle)[0, 1] ** 2 > FIT:
        direction = "clockwise" if slope > 0 else "counterclockwise"
        return Action("spin", direction, speed_class("spin", abs(slope)))
    return Action("still")


def _smooth(values: ndarray) -> ndarray:
    """Return the running median of three."""
    return np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0)


def _way(time: ndarray, place: ndarray, reach: float) -> Action:
    """Classify the motion of a moving object from its positions [T, 2] at times [T]."""
    span = np.ptp(_smooth(place), axis=0)
    corners = [turns(place[:, axis], TURNS) if span[axis] >= MOVES else [] for axis in (0, 1)]
    turned = np.concatenate([place[corners[axis], axis] for axis in (0, 1)])
    gaps = np.minimum(turned, 1 - turned) - reach - WALL
    if not len(gaps) or np.median(gaps) < AT_WALL:
        first_turn = [extrema[0] if extrema else len(time) - 1 for extrema in corners]
        return _bounce(time, place, first_turn)
    if span.min() > ROUND * span.max():
        frequency, fit = rhythm(time, place)
        x, y = (place - (place.max(axis=0) + place.min(axis=0)) / 2).T
        turn = float((x[:-1] * np.diff(y) - y[:-1] * np.diff(x)).sum())
        kind, direction = "orbit", "clockwise" if turn > 0 else "counterclockwise"
    else:
        frequency, fit = rhythm(time, place[:, [int(span.argmax())]])
        kind, direction = "swing", ("horizontal", "vertical")[int(span.argmax())]
    return Action(kind, direction, speed_class(kind, frequency)) if fit > FIT else Action(OTHER)


def _bounce(time: ndarray, place: ndarray, first_turn: list[int]) -> Action:
    """Return a bounce with its direction up to the first turn on each axis, and median speed."""
    velocity = np.diff(place, axis=0) / np.diff(time)[:, None]
    speeds = np.hypot(*velocity.T)[np.diff(time) < 1.5 / FPS]
    way = []
    for axis, end in enumerate(first_turn):
        end = min(max(end, 2), 16)
        way.append(float(np.median(velocity[:end, axis])))
    across = ("right" if way[0] > 0 else "left") if abs(way[0]) > ROUND * abs(way[1]) else ""
    along = ("down" if way[1] > 0 else "up") if abs(way[1]) > ROUND * abs(way[0]) else ""
    rate = float(np.median(speeds)) if len(speeds) else 0.0
    return Action("bounce", f"{along} {across}".strip(), speed_class("bounce", rate))
