"""Semantic rows: does a clip show what its caption states? 0–100 each, for stated facts only."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from ..captions import Caption, Stated
from ..world import SIZES
from .action import Action, see_action
from .track import Detections, Track, in_front

START = 12  # first frames, over which a relation in space is measured
APART = 0.6  # distance of centres along an axis for a relation, in sums of the two radii
SIZE_LIMIT = float(np.sqrt(SIZES["small"][1] * SIZES["large"][0]))  # radius in frame sides


@dataclass(frozen=True, slots=True)
class Semantic:
    """The semantic rows, 0–100; relation is NaN if none is stated."""

    object: float  # shapes, and sizes where stated: half for a right shape of the wrong size
    colour: float  # of the objects, and of the ground where stated
    count: float  # frames with the right number of objects
    relation: float
    action: float  # kinds of motion; of right kinds also directions and speeds where stated


def seen_size(track: Track) -> str:
    """Return small or large, split at the geometric mean of the world's two ranges."""
    return "large" if np.median(track.radius[track.known]) > SIZE_LIMIT else "small"


def match(caption: Caption, tracks: tuple[Track, ...], actions: list[Action]) -> list[int | None]:
    """Assign a track to each stated object, by shape, then colour, then motion; None if missing."""
    places = [*range(len(tracks)), *[None] * len(caption.objects)]

    def worth(chosen: tuple[int | None, ...]) -> int:
        return sum(
            4 * (tracks[index].shape == stated.shape)
            + 2 * (tracks[index].colour == stated.colour)
            + (actions[index].kind == stated.motion)
            for index, stated in zip(chosen, caption.objects, strict=True)
            if index is not None
        )

    longest = sorted(places[: len(tracks)], key=lambda index: -tracks[index].present.sum())[:4]
    candidates = permutations([*longest, *places[len(tracks) :]], len(caption.objects))
    return list(max(candidates, key=worth))


def semantic_rows(detections: Detections, caption: Caption) -> Semantic:
    """Score a clip's detections against a caption."""
    tracks = detections.tracks
    actions = [see_action(track) for track in tracks]
    chosen = match(caption, tracks, actions)
    pairs = [
        (stated, None, None) if index is None else (stated, tracks[index], actions[index])
        for stated, index in zip(caption.objects, chosen, strict=True)
    ]
    colours = [
        float(track is not None and track.colour == stated.colour) for stated, track, _ in pairs
    ]
    if caption.ground:
        colours.append(float(detections.backdrop.name == caption.ground))
    there = [(track.present | track.hidden).astype(int) for track in tracks]
    seen = sum(there) + np.zeros(detections.frames)
    relation = np.nan
    if caption.relation:
        relation = 100 * float(_relation(caption.relation, chosen, tracks))
    return Semantic(
        object=100 * float(np.mean([_object(stated, track) for stated, track, _ in pairs])),
        colour=100 * float(np.mean(colours)),
        count=100 * float((seen == len(caption.objects)).mean()),
        relation=relation,
        action=100 * float(np.mean([_action(stated, action) for stated, _, action in pairs])),
    )


def _object(stated: Stated, track: Track | None) -> float:
    if track is None or track.shape != stated.shape:
        return 0.0
    return 1.0 if stated.size in (None, seen_size(track)) else 0.5


def _action(stated: Stated, action: Action | None) -> float:
    if action is None or action.kind != stated.motion:
        return 0.0
    marks = [1.0]
    if stated.direction:
        marks.append(float(action.direction == stated.direction))
    if stated.speed:
        marks.append(float(action.speed == stated.speed))
    return sum(marks) / len(marks)


def _relation(relation: str, chosen: list[int | None], tracks: tuple[Track, ...]) -> bool:
    """Return whether the relation holds: in the first frames, or in depth where objects meet."""
    if None in chosen:
        return False
    first, second = (tracks[index] for index in chosen)
    if relation in ("behind", "front"):
        front = in_front(tracks).get((min(chosen), max(chosen)))
        return front == chosen[relation == "behind"]
    step = np.median(second.position[:START] - first.position[:START], axis=0)
    sign = 1 if relation in ("left", "above") else -1
    least = APART * float(np.median(first.radius) + np.median(second.radius))
    return bool(sign * step[int(relation in ("above", "below"))] > least)
