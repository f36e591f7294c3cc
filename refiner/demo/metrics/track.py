"""Blobs to tracks: which object is which over time, also behind another, and what each is by
frame."""

from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy import ndarray

from ..motion import FPS
from ..scene import check_size
from ..shapes import SHAPES
from .classify import NAMES, angles, shape_distances
from .segment import COLOURS, Backdrop, Blobs, find_backdrop, find_blobs

NEAR = (
    10 / 64
)  # frame sides between two frames, up to which a blob of another colour is still the same object
PASSING = 3  # frames: blobs that last no longer are no objects
BRIEF = 0.05  # of the frames, likewise
WHOLE = 0.08  # of an object's cover, which a measurement may miss next to another object
ALIKE = 0.5  # in units of shape_distances
BLEND = 60  # pixels at 64×64, smaller than the world's smallest object
HIDES = 0.12  # of an object's cover, lost to the other on average, from which one is behind


@dataclass(frozen=True, slots=True)
class Track:
    """One object by frame. Positions and radii are in frame sides; they and angles are interpolated
    where not known."""

    shape: str
    colour: str
    present: ndarray  # [F], something of it is seen
    clean: ndarray  # [F], seen and next to no other object, so that its looks can be measured
    known: ndarray  # [F], seen as a whole, so that its place and size can be measured
    hidden: ndarray  # [F], not seen because another is in front of it
    position: ndarray  # [F, 2]
    radius: ndarray  # [F]
    angle: ndarray  # [F], radians, without jumps; 0 where no turn can be seen
    rgb: ndarray  # [F, 3], NaN where it is not seen
    same_shape: ndarray  # [F], where clean: its looks are this shape's rather than another's
    lost: ndarray  # [F], of its cover, next to another object; 0 where clean


@dataclass(frozen=True, slots=True)
class Found:
    """What a clip is found to hold."""

    frames: int
    size: int
    backdrop: Backdrop
    tracks: tuple[Track, ...]


def find(frames: ndarray) -> Found:
    """Ground and objects of uint8 frames [F, S, S, 3]; ValueError for anything else, and for less
    than a second."""
    if (
        frames.dtype != np.uint8
        or frames.ndim != 4
        or frames.shape[3] != 3
        or frames.shape[1] != frames.shape[2]
    ):
        raise ValueError(
            f"frames {frames.dtype} {list(frames.shape)}: give uint8 [F, S, S, 3] with square frames"
        )
    if len(frames) < FPS:
        raise ValueError(f"{len(frames)} frames: motion is judged over at least {FPS}, one second")
    check_size(frames.shape[1])
    backdrop = find_backdrop(frames)
    blobs = find_blobs(frames, backdrop)
    distances = shape_distances(blobs)
    least = max(PASSING, BRIEF * len(frames))
    chains = [np.array(chain) for chain in link(blobs, frames.shape[1]) if len(chain) > least]
    chains = [chain for chain in chains if not _blend(blobs, chain, frames.shape[1])]
    tracks = [_track(blobs, distances, chain, len(frames), frames.shape[1]) for chain in chains]
    return Found(len(frames), frames.shape[1], backdrop, tuple(tracks))


def link(blobs: Blobs, size: int) -> list[list[int]]:
    """Blob indices of each object in order of time: the same colour first, then what is near;
    however far it jumps."""
    chains: list[list[int]] = []
    for frame in np.unique(blobs.frame):
        free = list(np.flatnonzero(blobs.frame == frame))
        open_chains = list(range(len(chains)))
        for same_colour in (True, False):
            costs = []
            for chain in open_chains:
                last = chains[chain][-1]
                for blob in free:
                    distance = float(np.hypot(*(blobs.centre[blob] - blobs.centre[last]))) / size
                    if (
                        (blobs.colour[blob] == blobs.colour[last])
                        if same_colour
                        else (distance < NEAR and blobs.frame[last] == frame - 1)
                    ):
                        costs.append((distance, chain, blob))
            for _, chain, blob in sorted(costs):
                if chain in open_chains and blob in free:
                    chains[chain].append(blob)
                    open_chains.remove(chain)
                    free.remove(blob)
        chains.extend([blob] for blob in free)
    return chains


def _blend(blobs: Blobs, chain: ndarray, size: int) -> bool:
    """Whether it is only the mixed colour between two objects that a blur makes: small, and never
    by itself."""
    return bool(
        blobs.touching[chain].all() and np.median(blobs.area[chain]) < BLEND * (size / 64) ** 2
    )


def _spread_out(values: ndarray, at: ndarray, frames: int) -> ndarray:
    """Values known at some frames, linear between them: [F] or [F, k]."""
    columns = [np.interp(np.arange(frames), at, column) for column in np.atleast_2d(values.T)]
    return np.stack(columns, axis=-1) if values.ndim == 2 else columns[0]


def _hidden(present: ndarray, touching: ndarray) -> ndarray:
    """Gaps that begin and end next to another object."""
    hidden = np.zeros(len(present), dtype=bool)
    seen = np.flatnonzero(present)
    for before, after in pairwise(seen):
        hidden[before + 1 : after] = touching[before] and touching[after]
    if touching[seen[-1]]:
        hidden[seen[-1] + 1 :] = True
    return hidden


def _track(blobs: Blobs, distances: ndarray, chain: ndarray, frames: int, size: int) -> Track:
    at, touching = blobs.frame[chain], blobs.touching[chain]
    apart = ~touching if (~touching).sum() >= PASSING else np.ones(len(chain), dtype=bool)
    full = _spread_out(blobs.area[chain][apart], at[apart], frames)
    if apart.all() and touching.any():
        full[:] = np.quantile(blobs.area[chain], 0.9)
    lost = np.zeros(frames)
    lost[at] = np.where(touching, 1 - blobs.area[chain] / full[at], 0)
    whole = ~touching | (np.abs(lost[at]) < WHOLE)
    whole = (
        whole if whole.any() else np.ones(len(chain), dtype=bool)
    )  # never seen by itself: take it as it is
    apart = apart if not (apart & ~whole).any() else whole
    shape = NAMES[int(np.minimum(distances[chain[apart]], 4).mean(axis=0).argmin())]
    present, clean, known, near = (np.zeros(frames, dtype=bool) for _ in range(4))
    present[at], clean[at[apart]], known[at[whole]], near[at] = True, True, True, touching
    hidden = _hidden(present, near)
    lost[hidden] = 1
    rgb, same = np.full((frames, 3), np.nan), np.zeros(frames, dtype=bool)
    rgb[at] = blobs.rgb[chain]
    own = distances[chain[apart], NAMES.index(shape)]
    same[at[apart]] = own <= distances[chain[apart]].min(axis=1) + ALIKE
    good, good_at = chain[whole], at[whole]
    turned = angles(blobs.pick(good), shape)
    turned = np.unwrap(turned, period=2 * np.pi / (SHAPES[shape].symmetry or 1))
    votes = np.bincount(blobs.colour[chain], minlength=len(COLOURS))
    return Track(
        shape=shape,
        colour=COLOURS[int(votes.argmax())],
        present=present,
        clean=clean,
        known=known,
        hidden=hidden,
        position=_spread_out(blobs.centre[good] / size, good_at, frames),
        radius=_spread_out(np.sqrt(blobs.area[good] / SHAPES[shape].area) / size, good_at, frames),
        angle=_spread_out(turned, good_at, frames),
        rgb=rgb,
        same_shape=same,
        lost=lost,
    )


def in_front(tracks: tuple[Track, ...]) -> dict[tuple[int, int], int]:
    """For every two tracks (by index) that come so near that one hides the other, which of them is
    in front."""
    front = {}
    for one, other in combinations(range(len(tracks)), 2):
        both = (tracks[one].lost != 0) | (tracks[other].lost != 0)
        losses = [
            float(np.clip(tracks[index].lost[both], 0, 1).max(initial=0)) for index in (one, other)
        ]
        if max(losses) > HIDES and max(losses) > 1.5 * min(losses):
            front[one, other] = one if losses[0] < losses[1] else other
    return front
