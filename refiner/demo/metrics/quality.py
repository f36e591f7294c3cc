"""Quality rows: how good a clip is whatever its caption. Each is 0–100, and about 100 for what the
world renders.

Lengths are in 64ths of the frame side, colours and errors in levels of 0–255.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from ..motion import WALL
from ..palette import GROUND_COLOURS, OBJECT_COLOURS
from ..render import Layer, draw, draw_ground
from ..shapes import SHAPES
from .track import Found, Track, in_front

RIM = 3 / 64  # around an object, in frame sides: what no longer counts as ground
FIRST, LAST = 9, 12  # frames of the first chunk and of the last
WINDOW = 16  # frames, one second, in which something has to happen
# What a window has to show of change to count, and what is only noise: places, radii (relative),
# angles (radians), and how much of an object is hidden.
ENOUGH, NOISE = (1.8, 0.05, 0.40, 0.15), (0.5, 0.02, 0.12, 0.05)

# What the world itself shows from frame to frame: the fastest swing bends 0.46, the fastest pulse's
# radius 0.13, the fastest bounce goes 1.9 and turns at a wall.
BEND, SWELL, STEP = 0.55, 0.3, 2.5
# By how much a row may be off before it falls, about what 8-bit pixels cost the truth, and the
# excess at which 37 of 100 are left: lengths for smoothness, levels for the others.
ALLOWED = {
    "flicker": 0.6,
    "background": 0.5,
    "objects": 1.5,
    "ground": 1.0,
    "colour": 12.0,
    "drift": 3.0,
}
SCALE = {
    "smoothness": 1.5,
    "flicker": 8,
    "background": 8,
    "objects": 12,
    "ground": 12,
    "colour": 40,
    "drift": 25,
}


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality rows of a clip, 0–100."""

    smoothness: float  # places and sizes change without jumps
    flicker: float  # ground and colours do not change to and fro from frame to frame; 100 is none
    subject: float  # every object stays there, and stays itself
    background: float  # the ground stays as it is
    imaging: float  # pixels are those of the world's shapes, colours, edges and grounds
    dynamic: float  # the share of seconds in which something moves, turns or grows
    drift: float  # the last chunk is as good as the first, and has its colours; 100 is no drift


@dataclass(frozen=True, slots=True)
class Errors:
    """How far the pixels are from what the world would render of what was found, by frame; NaN
    where not known."""

    objects: ndarray  # [F], mean over the pixels in and around objects
    ground: (
        ndarray  # [F], root mean square over the others, so that a pattern of a few pixels counts
    )


def quality_rows(frames: ndarray, found: Found) -> Quality:
    """The quality rows of uint8 frames [F, S, S, 3] and what was found in them."""
    if not found.tracks:
        far = ground_mask(found)
        return Quality(0, _flicker(frames, found, far), 0, _background(frames, far), 0, 0, 0)
    far = ground_mask(found)
    errors = render_errors(frames, found, far)
    return Quality(
        smoothness=float(np.mean([_smoothness(track) for track in found.tracks])),
        flicker=_flicker(frames, found, far),
        subject=_subject(found),
        background=_background(frames, far),
        imaging=_imaging(errors),
        dynamic=_dynamic(found),
        drift=_drift(found, errors),
    )


def _marks(excess: ndarray | float, row: str) -> ndarray:
    """1 up to what the row is allowed, then falling by e for every scale of it."""
    return np.exp(-np.maximum(np.asarray(excess) - ALLOWED.get(row, 0.0), 0.0) / SCALE[row])


def _score(excess: float, row: str) -> float:
    """The same out of 100."""
    return 100 * float(_marks(excess, row))


def ground_mask(found: Found) -> ndarray:
    """The pixels that lie away from every object: bool [F, S, S]."""
    grid = (np.arange(found.size, dtype=np.float32) + 0.5) / found.size
    far = np.ones((found.frames, found.size, found.size), dtype=bool)
    for track in found.tracks:
        reach = np.where(track.present, track.radius * SHAPES[track.shape].reach + RIM, 0)
        x, y = (track.position[:, axis, None].astype(np.float32) for axis in (0, 1))
        far &= ((grid - x) ** 2)[:, None, :] + ((grid - y) ** 2)[:, :, None] > (reach**2)[
            :, None, None
        ]
    return far


def _bend(values: ndarray) -> ndarray:
    """How far each value is from halfway between its neighbours in time."""
    return values[1:-1] - (values[:-2] + values[2:]) / 2


def _smoothness(track: Track) -> float:
    """Root mean square of what places and sizes bend beyond what the world's motions do; a wall may
    turn them."""
    inside = track.known[1:-1] & track.known[:-2] & track.known[2:]
    if not inside.any():
        return 0.0
    step = 64 * np.hypot(*np.diff(track.position, axis=0).T)
    speed = np.minimum(step[1:], step[:-1])
    reach = (track.radius * SHAPES[track.shape].reach + WALL)[1:-1]
    place = track.position[1:-1]
    wall = 64 * (np.minimum(place, 1 - place).min(axis=1) - reach) < 2 + speed
    turn = np.where(wall, np.maximum(step[1:], step[:-1]).clip(max=STEP), 0)
    jump = 64 * np.hypot(*_bend(track.position).T) - BEND - turn
    swell = 2 * (
        64 * np.abs(_bend(track.radius)) - SWELL
    )  # an edge moves by half of what the width does
    excess = np.maximum(np.maximum(jump, swell), 0)[inside]
    return _score(float(np.sqrt((excess**2).mean())), "smoothness")


def _flicker(frames: ndarray, found: Found, far: ndarray) -> float:
    """Mean bend of the ground's pixels, and of the objects' colours, in levels."""
    still = far[1:-1] & far[:-2] & far[2:]
    video = frames.astype(np.int16)
    bend = np.abs(2 * video[1:-1] - video[:-2] - video[2:]).sum(axis=-1)[still]
    parts = [float(bend.mean()) / 6 if len(bend) else 0.0]
    for track in found.tracks:
        colours = np.where(track.clean[:, None], track.rgb, np.nan)
        bends = np.abs(_bend(colours))
        if not np.isnan(bends).all():
            parts.append(float(np.nanmean(bends)))
    return _score((parts[0] + (np.mean(parts[1:]) if parts[1:] else 0)) / 2, "flicker")


def _subject(found: Found) -> float:
    """Mean over the frames in which an object is not hidden: there, of its colour, and of its
    shape."""
    scores, weights = [], []
    for track in found.tracks:
        off = np.linalg.norm(track.rgb - np.nanmedian(track.rgb, axis=0), axis=1)
        kept = _marks(np.nan_to_num(off), "colour") * np.where(
            track.clean & ~track.same_shape, 0.5, 1
        )
        scores.append((kept * track.present)[~track.hidden].mean())
        weights.append(track.present.sum())
    return 100 * float(np.average(scores, weights=weights))


def _background(frames: ndarray, far: ndarray) -> float:
    """Mean distance of the ground's pixels from their own mean over time."""
    weight = far[..., None].astype(np.float32)
    mean = (frames * weight).sum(axis=0) / np.maximum(weight.sum(axis=0), 1)
    return _score(
        float((np.abs(frames - mean) * weight).sum() / max(3 * weight.sum(), 1)), "background"
    )


def render_errors(frames: ndarray, found: Found, far: ndarray) -> Errors:
    """Renders what was found in the world's own colours, and compares."""
    tones = found.backdrop.name.split(" over ")
    top, bottom = GROUND_COLOURS[tones[0]], GROUND_COLOURS[tones[-1]]
    order = list(range(len(found.tracks)))
    front = in_front(found.tracks)
    order.sort(
        key=lambda index: sum(index in pair and first == index for pair, first in front.items())
    )
    layers = [
        Layer(
            track.shape,
            OBJECT_COLOURS[track.colour],
            track.position,
            track.radius * track.present,
            track.angle,
        )
        for track in (found.tracks[index] for index in order)
    ]
    drawn = draw(draw_ground(top, bottom, found.backdrop.split, found.size), layers, found.frames)
    off = np.abs(frames.astype(np.int16) - drawn).sum(axis=-1) / np.float32(3)
    area = far.sum(axis=(1, 2))
    known = np.logical_and.reduce([track.clean | ~track.present for track in found.tracks]) & (
        area < far[0].size
    )
    near = (off * ~far).sum(axis=(1, 2)) / np.maximum(far[0].size - area, 1)
    ground = np.sqrt((off**2 * far).sum(axis=(1, 2)) / np.maximum(area, 1))
    return Errors(np.where(known, near, np.nan), ground)


def _mean(values: ndarray, instead: float = 0.0) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else instead


def _imaging(errors: Errors) -> float:
    objects = _score(_mean(errors.objects), "objects")
    return 0.5 * objects + 0.5 * _score(_mean(errors.ground), "ground")


def _dynamic(found: Found) -> float:
    """Mean over windows of the clearest change of any object, 1 from what the world's slowest
    motions show."""
    starts = range(0, max(found.frames - WINDOW, 0) + 1, WINDOW // 2)
    cues = []
    for track in found.tracks:
        size = track.radius / np.median(track.radius)
        changes = (
            64 * track.position,
            *(values[:, None] for values in (size, track.angle, track.lost)),
        )
        for values, enough, noise in zip(changes, ENOUGH, NOISE, strict=True):
            mean = (values[:-2] + values[1:-1] + values[2:]) / 3 if len(values) > 2 else values
            spans = [
                float(np.ptp(mean[start : start + WINDOW - 2], axis=0).max()) for start in starts
            ]
            cues.append((np.array(spans) - noise) / (enough - noise))
    return 100 * float(np.clip(np.max(cues, axis=0), 0, 1).mean())


def _drift(found: Found, errors: Errors) -> float:
    """The first chunk against the last: colours, distance from the world, and which objects are
    there."""
    first, last = slice(0, FIRST), slice(-LAST, None)
    tones = found.backdrop.tones
    change = [
        float(np.linalg.norm(tones[last].mean(axis=0) - tones[first].mean(axis=0), axis=1).mean())
    ]
    kept = []
    for track in found.tracks:
        change.append(
            _mean(np.linalg.norm(_colour(track, last) - _colour(track, first), keepdims=True))
        )
        seen = track.present | track.hidden
        kept.append(1 - abs(float(seen[last].mean()) - float(seen[first].mean())))
    parts = [part for part in (errors.objects, errors.ground) if _known(part, first, last)]
    worse = max(_mean(part[last]) - _mean(part[first]) for part in parts)
    return float(np.mean(kept)) * _score(float(np.mean(change)) + max(worse, 0.0), "drift")


def _known(values: ndarray, *parts: slice) -> bool:
    return all((~np.isnan(values[part])).any() for part in parts)


def _colour(track: Track, part: slice) -> ndarray:
    """Mean colour over a part of the clip; NaN where the object is not seen as a whole there."""
    colours = track.rgb[part][track.clean[part]]
    return colours.mean(axis=0) if len(colours) else np.full(3, np.nan)
