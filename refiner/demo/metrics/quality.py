"""Quality rows: how good a clip is, whatever its caption; 0–100, about 100 for rendered clips.

Lengths are in 64ths of the frame side, colours and errors in levels of 0–255.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from ..motion import WALL
from ..palette import GROUND_COLOURS, OBJECT_COLOURS
from ..render import Layer, draw, draw_ground
from ..shapes import SHAPES
from .track import Detections, Track, in_front

RIM = 3 / 64  # margin around an object, in frame sides, that is not scored as ground
FIRST, LAST = 9, 12  # frames of the first and the last chunk
WINDOW = 16  # frames, one second, in which something has to happen
# Changes in a window that count in full, and those that are noise: of positions, relative radii,
# angles (radians), and the hidden share of an object.
ENOUGH, NOISE = (1.8, 0.05, 0.40, 0.15), (0.5, 0.02, 0.12, 0.05)

# Largest changes from frame to frame in the world, with a margin: the fastest swing bends by 0.46,
# the fastest pulse's radius by 0.13, the fastest bounce moves by 1.9 and turns at a wall.
BEND, SWELL, STEP = 0.55, 0.3, 2.5
# Error that a row may have before its score falls, about that of the truth in 8-bit pixels, and
# the excess that leaves 37 of 100: lengths for smoothness, levels for the others.
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

    smoothness: float  # positions and sizes change without jumps
    flicker: float  # ground and colours do not oscillate from frame to frame; 100 is no flicker
    subject: float  # every object stays present, with its shape and colour
    background: float  # the ground stays the same
    imaging: float  # pixels match the world's shapes, colours, edges and grounds
    dynamic: float  # share of seconds in which something moves, turns or grows
    drift: float  # the last chunk is as good as the first, with its colours; 100 is no drift


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors by frame against a rendering of the detections; NaN where unknown."""

    objects: ndarray  # [F], mean over the pixels in and around objects
    ground: ndarray  # [F], rms over the others, so that a pattern of few pixels counts


def quality_rows(frames: ndarray, detections: Detections) -> Quality:
    """Score uint8 frames [F, S, S, 3] and the detections in them."""
    far = ground_mask(detections)
    steady, background = flicker(frames, detections, far), _background(frames, far)
    if not detections.tracks:
        return Quality(0, steady, 0, background, 0, 0, 0)
    errors = render_errors(frames, detections, far)
    return Quality(
        smoothness=float(np.mean([_smoothness(track) for track in detections.tracks])),
        flicker=steady,
        subject=_subject(detections),
        background=background,
        imaging=_imaging(errors),
        dynamic=_dynamic(detections),
        drift=_drift(detections, errors),
    )


def _marks(excess: ndarray | float, row: str) -> ndarray:
    """Return 1 up to the row's allowance, then fall by a factor of e per SCALE."""
    return np.exp(-np.maximum(np.asarray(excess) - ALLOWED.get(row, 0.0), 0.0) / SCALE[row])


def _score(excess: float, row: str) -> float:
    """Return the marks out of 100."""
    return 100 * float(_marks(excess, row))


def ground_mask(detections: Detections) -> ndarray:
    """Return the pixels away from every object: bool [F, S, S]."""
    size = detections.size
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    far = np.ones((detections.frames, size, size), dtype=bool)
    for track in detections.tracks:
        reach = np.where(track.present, track.radius * SHAPES[track.shape].reach + RIM, 0)
        x, y = (track.position[:, axis, None].astype(np.float32) for axis in (0, 1))
        square = ((grid - x) ** 2)[:, None, :] + ((grid - y) ** 2)[:, :, None]
        far &= square > (reach**2)[:, None, None]
    return far


def _bend(values: ndarray) -> ndarray:
    """Return each value's deviation from the mean of its neighbours in time."""
    return values[1:-1] - (values[:-2] + values[2:]) / 2


def _smoothness(track: Track) -> float:
    """Score the rms bend of positions and sizes beyond the world's motions and turns at walls."""
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
    swell = 2 * (64 * np.abs(_bend(track.radius)) - SWELL)  # the width changes by twice as much
    excess = np.maximum(np.maximum(jump, swell), 0)[inside]
    return _score(float(np.sqrt((excess**2).mean())), "smoothness")


def flicker(
    frames: ndarray, detections: Detections, far: ndarray, among: ndarray | None = None
) -> float:
    """Score the mean bend of the ground's pixels and of the objects' colours, in levels.

    Of all frames, or of those `among` [F].
    """
    inner = slice(None) if among is None else among[1:-1]
    still = (far[1:-1] & far[:-2] & far[2:])[inner]
    video = frames.astype(np.int16)
    bend = np.abs(2 * video[1:-1] - video[:-2] - video[2:])[inner].sum(axis=-1)[still]
    ground = float(bend.mean()) / 6 if len(bend) else 0.0
    objects = []
    for track in detections.tracks:
        colours = np.where(track.clean[:, None], track.rgb, np.nan)
        bends = np.abs(_bend(colours))[inner]
        if not np.isnan(bends).all():
            objects.append(float(np.nanmean(bends)))
    return _score((ground + (np.mean(objects) if objects else 0)) / 2, "flicker")


def _subject(detections: Detections) -> float:
    """Score presence, colour and shape over the frames in which an object is not hidden."""
    scores, weights = [], []
    for track in detections.tracks:
        off = np.linalg.norm(track.rgb - np.nanmedian(track.rgb, axis=0), axis=1)
        shape = np.where(track.clean & ~track.same_shape, 0.5, 1)
        marks = _marks(np.nan_to_num(off), "colour") * shape
        scores.append((marks * track.present)[~track.hidden].mean())
        weights.append(track.present.sum())
    return 100 * float(np.average(scores, weights=weights))


def _background(frames: ndarray, far: ndarray) -> float:
    """Score the mean deviation of the ground's pixels from their mean over time."""
    weight = far[..., None].astype(np.float32)
    mean = (frames * weight).sum(axis=0) / np.maximum(weight.sum(axis=0), 1)
    deviation = (np.abs(frames - mean) * weight).sum() / max(3 * weight.sum(), 1)
    return _score(float(deviation), "background")


def render_errors(frames: ndarray, detections: Detections, far: ndarray) -> Errors:
    """Render the detections in the world's colours and compare."""
    backdrop, tracks = detections.backdrop, detections.tracks
    tones = backdrop.name.split(" over ")
    top, bottom = GROUND_COLOURS[tones[0]], GROUND_COLOURS[tones[-1]]
    front = in_front(tracks)

    def times_in_front(index: int) -> int:
        return sum(index in pair and first == index for pair, first in front.items())

    layers = [
        Layer(
            track.shape, OBJECT_COLOURS[track.colour], track.position,
            track.radius * track.present, track.angle,
        )
        for track in (tracks[index] for index in sorted(range(len(tracks)), key=times_in_front))
    ]  # fmt: skip
    ground = draw_ground(top, bottom, backdrop.split, detections.size)
    drawn = draw(ground, layers, detections.frames)
    off = np.abs(frames.astype(np.int16) - drawn).sum(axis=-1) / np.float32(3)
    area = far.sum(axis=(1, 2))
    clean = np.logical_and.reduce([track.clean | ~track.present for track in tracks])
    known = clean & (area < far[0].size)
    near = (off * ~far).sum(axis=(1, 2)) / np.maximum(far[0].size - area, 1)
    away = np.sqrt((off**2 * far).sum(axis=(1, 2)) / np.maximum(area, 1))
    return Errors(np.where(known, near, np.nan), away)


def _mean(values: ndarray, instead: float = 0.0) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else instead


def _imaging(errors: Errors) -> float:
    objects = _score(_mean(errors.objects), "objects")
    return 0.5 * objects + 0.5 * _score(_mean(errors.ground), "ground")


def _dynamic(detections: Detections) -> float:
    """Score each window's clearest change of any object; the world's slowest motions score 1."""
    starts = range(0, max(detections.frames - WINDOW, 0) + 1, WINDOW // 2)
    cues = []
    for track in detections.tracks:
        size = track.radius / np.median(track.radius)
        scalars = [values[:, None] for values in (size, track.angle, track.lost)]
        changes = (64 * track.position, *scalars)
        for values, enough, noise in zip(changes, ENOUGH, NOISE, strict=True):
            mean = (values[:-2] + values[1:-1] + values[2:]) / 3 if len(values) > 2 else values
            windows = (mean[start : start + WINDOW - 2] for start in starts)
            spans = [float(np.ptp(window, axis=0).max()) for window in windows]
            cues.append((np.array(spans) - noise) / (enough - noise))
    return 100 * float(np.clip(np.max(cues, axis=0), 0, 1).mean())


def _drift(detections: Detections, errors: Errors) -> float:
    """Score the last chunk against the first: colours, errors, and which objects are present."""
    first, last = slice(0, FIRST), slice(-LAST, None)
    tones = detections.backdrop.tones
    step = tones[last].mean(axis=0) - tones[first].mean(axis=0)
    change = [float(np.linalg.norm(step, axis=1).mean())]
    presence = []
    for track in detections.tracks:
        step = _colour(track, last) - _colour(track, first)
        change.append(_mean(np.linalg.norm(step, keepdims=True)))
        seen = track.present | track.hidden
        presence.append(1 - abs(float(seen[last].mean()) - float(seen[first].mean())))
    known = [each for each in (errors.objects, errors.ground) if _known(each, first, last)]
    worse = max(_mean(each[last]) - _mean(each[first]) for each in known)
    return float(np.mean(presence)) * _score(float(np.mean(change)) + max(worse, 0.0), "drift")


def _known(values: ndarray, *spans: slice) -> bool:
    return all((~np.isnan(values[span])).any() for span in spans)


def _colour(track: Track, span: slice) -> ndarray:
    """Average the colour over some frames; NaN if the object is never seen alone in them."""
    colours = track.rgb[span][track.clean[span]]
    return colours.mean(axis=0) if len(colours) else np.full(3, np.nan)
