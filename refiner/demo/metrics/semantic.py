"""Semantic rows: whether a clip holds what its caption states. Each is 0–100; what is not stated is
not asked."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from ..captions import Caption, Stated
from ..world import SIZES
from .action import Action, see_action
from .track import Found, Track, in_front

START = 12  # frames over which the relation at the start is seen
# of the two radii together: how far centres lie apart along an axis for left, right, above, below
APART = 0.6
SIZE_LIMIT = float(np.sqrt(SIZES["small"][1] * SIZES["large"][0]))  # radius in frame sides


@dataclass(frozen=True, slots=True)
class Semantic:
    """How much of what the caption states is there, 0–100; relation is NaN where none is stated."""

    object: float  # shapes, and sizes where stated: half for a right shape of the wrong size
    colour: float  # of the objects, and of the ground where stated
    count: float  # frames with the right number of objects
    relation: float
    action: float  # kinds of motion; of right kinds also directions and speeds where stated


def seen_size(track: Track) -> str:
    """Small or large, halfway (as a ratio) between the world's two."""
    return "large" if np.median(track.radius[track.known]) > SIZE_LIMIT else "small"


def match(caption: Caption, tracks: tuple[Track, ...], actions: list[Action]) -> list[int | None]:
    """Which track is which stated object: by shape first, then colour, then motion; None where
    there is none."""
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
    return list(
        max(permutations([*longest, *places[len(tracks) :]], len(caption.objects)), key=worth)
    )


def semantic_rows(found: Found, caption: Caption) -> Semantic:
    """The semantic rows of a clip for a caption."""
    actions = [see_action(track) for track in found.tracks]
    chosen = match(caption, found.tracks, actions)
    pairs = [
        (
            stated,
            found.tracks[index] if index is not None else None,
            actions[index] if index is not None else None,
        )
        for stated, index in zip(caption.objects, chosen, strict=True)
    ]
    colours = [
        float(track is not None and track.colour == stated.colour) for stated, track, _ in pairs
    ]
    if caption.ground:
        colours.append(float(found.backdrop.name == caption.ground))
    seen = sum((track.present | track.hidden).astype(int) for track in found.tracks) + np.zeros(
        found.frames
    )
    return Semantic(
        object=100 * float(np.mean([_object(stated, track) for stated, track, _ in pairs])),
        colour=100 * float(np.mean(colours)),
        count=100 * float((seen == len(caption.objects)).mean()),
        relation=100 * float(_relation(caption.relation, chosen, found.tracks))
        if caption.relation
        else np.nan,
        action=100 * float(np.mean([_action(stated, action) for stated, _, action in pairs])),
    )


def _object(stated: Stated, track: Track | None) -> float:
    if track is None or track.shape != stated.shape:
        return 0.0
    return 1.0 if stated.size in (None, seen_size(track)) else 0.5


def _action(stated: Stated, action: Action | None) -> float:
    if action is None or action.kind != stated.motion:
        return 0.0
    parts = [1.0]
    if stated.direction:
        parts.append(float(action.direction == stated.direction))
    if stated.speed:
        parts.append(float(action.speed == stated.speed))
    return sum(parts) / len(parts)


def _relation(relation: str, chosen: list[int | None], tracks: tuple[Track, ...]) -> bool:
    """Whether the first stated object lies so to the second: in the first frames, or in depth where
    they meet."""
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
