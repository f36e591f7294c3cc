"""Diversity: how much clips of one caption differ, against how much scenes of the world differ that
it is true of."""

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
from .track import Found, find

SCENES = 12  # of the world for each caption
SIZE_WEIGHT = 2  # a radius counts as its diameter


def diversity(clips: Sequence[ndarray], captions: Sequence[Caption]) -> float:
    """0–100 over uint8 clips [F, S, S, 3], each with its caption: 0 where all clips of a caption
    are the same, 100 where they differ as the world's do, in places, sizes and grounds.

    ValueError unless some caption has two clips.
    """
    return of_spreads(spreads(clips, captions))


def of_spreads(spread: ndarray) -> float:
    """The diversity of captions by their spreads [captions, 2]."""
    found, expected = spread.sum(axis=0)
    return 100 * min(1.0, found / expected)


def spreads(clips: Sequence[ndarray], captions: Sequence[Caption]) -> ndarray:
    """How much the clips of each caption differ, and how much the world's do: [captions with two
    clips or more, 2]."""
    by_caption: dict[Caption, list[ndarray]] = {}
    for clip, caption in zip(clips, captions, strict=True):
        by_caption.setdefault(caption, []).append(clip)
    by_caption = {caption: same for caption, same in by_caption.items() if len(same) > 1}
    if not by_caption:
        raise ValueError(
            f"{len(clips)} clips of as many captions: diversity needs two seeds of a caption or more"
        )
    rows = []
    for caption, same in by_caption.items():
        frames = min(len(clip) for clip in same)
        world = [_true(realise(caption, seed), frames) for seed in range(SCENES)]
        rows.append((_spread([_seen(find(clip), caption) for clip in same]), _spread(world)))
    return np.array(rows)


def _spread(clips: Sequence[ndarray]) -> float:
    """Mean distance of two, each [F, features]; what one of them lacks does not count as a
    difference."""
    return float(
        np.mean(
            [np.nan_to_num(np.abs(one - other)).mean() for one, other in combinations(clips, 2)]
        )
    )


def _seen(found: Found, caption: Caption) -> ndarray:
    """Places and sizes of the stated objects, and the ground's tones, by frame; NaN where there is
    none."""
    actions = [see_action(track) for track in found.tracks]
    columns = []
    for index in match(caption, found.tracks, actions):
        if index is None:
            columns.append(np.full((found.frames, 3), np.nan))
        else:
            track = found.tracks[index]
            columns.append(
                np.concatenate([track.position, SIZE_WEIGHT * track.radius[:, None]], axis=1)
            )
    return np.concatenate([*columns, found.backdrop.tones.reshape(found.frames, 6) / 255], axis=1)


def _true(scene: Scene, frames: int) -> ndarray:
    """The same of a scene of the world."""
    truth = scene.truth(frames)
    columns = [
        np.concatenate(
            [truth.position[:, index], SIZE_WEIGHT * truth.radius[:, index, None]], axis=1
        )
        for index in range(len(scene.bodies))
    ]
    tones = np.array([GROUND_COLOURS[tone] for tone in scene.ground.tones]).reshape(1, 6) / 255
    return np.concatenate([*columns, np.broadcast_to(tones, (frames, 6))], axis=1)
