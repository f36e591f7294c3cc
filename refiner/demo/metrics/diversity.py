"""Diversity: how much a caption's clips differ, relative to the world's scenes that fit it."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy import ndarray

from ..captions import Caption
from ..palette import GROUND_COLOURS
from ..scene import Scene
from ..world import realise
from .action import see_action
from .semantic import match
from .track import Detections, find

SCENES = 12  # world scenes per caption
SIZE_WEIGHT = 2  # a radius counts as its diameter


def diversity(clips: Sequence[ndarray], captions: Sequence[Caption]) -> float:
    """Score the diversity of uint8 clips [F, S, S, 3] of captions, 0–100.

    0 if all clips of a caption are the same, 100 if their places, sizes and grounds differ as the
    world's do. ValueError unless some caption has two clips.
    """
    return of_spreads(spreads(clips, captions))


def of_spreads(spread: ndarray) -> float:
    """Return the diversity of captions from their spreads [captions, 2]."""
    measured, expected = spread.sum(axis=0)
    return 100 * min(1.0, measured / expected)


def spreads(clips: Sequence[ndarray], captions: Sequence[Caption]) -> ndarray:
    """Return the spreads of each caption's clips and of the world's scenes: [captions, 2].

    Captions with a single clip are left out; ValueError if none is left.
    """
    by_caption: dict[Caption, list[ndarray]] = {}
    for clip, caption in zip(clips, captions, strict=True):
        by_caption.setdefault(caption, []).append(clip)
    by_caption = {caption: same for caption, same in by_caption.items() if len(same) > 1}
    if not by_caption:
        raise ValueError(
            f"{len(clips)} clips of as many captions:"
            " diversity needs two seeds of a caption or more"
        )
    rows = []
    for caption, same in by_caption.items():
        frames = min(len(clip) for clip in same)
        world = [_true(realise(caption, seed), frames) for seed in range(SCENES)]
        rows.append((_spread([_seen(find(clip), caption) for clip in same]), _spread(world)))
    return np.array(rows)


def _spread(clips: Sequence[ndarray]) -> float:
    """Return the mean distance of two clips, each [F, features]; NaN counts as no difference."""
    pairs = combinations(clips, 2)
    return float(np.mean([np.nan_to_num(np.abs(one - other)).mean() for one, other in pairs]))


def _columns(position: ndarray, radius: ndarray) -> ndarray:
    """Join an object's positions [F, 2] and weighted radii [F] to [F, 3]."""
    return np.concatenate([position, SIZE_WEIGHT * radius[:, None]], axis=1)


def _seen(detections: Detections, caption: Caption) -> ndarray:
    """Return stated objects' places and sizes and the ground's tones by frame; NaN if absent."""
    tracks, frames = detections.tracks, detections.frames
    actions = [see_action(track) for track in tracks]
    columns = []
    for index in match(caption, tracks, actions):
        if index is None:
            columns.append(np.full((frames, 3), np.nan))
        else:
            columns.append(_columns(tracks[index].position, tracks[index].radius))
    return np.concatenate([*columns, detections.backdrop.tones.reshape(frames, 6) / 255], axis=1)


def _true(scene: Scene, frames: int) -> ndarray:
    """Return the features of _seen for a scene of the world."""
    truth = scene.truth(frames)
    columns = [
        _columns(truth.position[:, index], truth.radius[:, index])
        for index in range(len(scene.bodies))
    ]
    tones = np.array([GROUND_COLOURS[tone] for tone in scene.ground.tones]).reshape(1, 6) / 255
    return np.concatenate([*columns, np.broadcast_to(tones, (frames, 6))], axis=1)
