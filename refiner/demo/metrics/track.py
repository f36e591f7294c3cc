"""Link blobs to tracks: objects over time, also while another hides them."""

from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy import ndarray

from ..motion import FPS
from ..scene import check_size
from ..shapes import SHAPES
from .classify import NAMES, angles, shape_distances
from .segment import COLOURS, Backdrop, Blobs, find_backdrop, find_blobs

NEAR = 10 / 64  # largest step, in frame sides, of an object whose blob changes colour
PASSING = 3  # frames; shorter chains of blobs are no objects
BRIEF = 0.05  # share of the frames, likewise
WHOLE = 0.08  # share of its area that an object next to another may lack and still be measured
ALIKE = 0.5  # in units of shape_distances
BLEND = 60  # pixels at 64×64, smaller than the world's smallest object
HIDES = 0.12  # share of its area that an object loses when it is behind another


@dataclass(frozen=True, slots=True)
class Track:
    """An object by frame. Positions and radii, in frame sides, and angles are interpolated."""

    shape: str
    colour: str
    present: ndarray  # [F], visible at least in part
    clean: ndarray  # [F], visible and touching no other object: its looks can be measured
    known: ndarray  # [F], visible as a whole: its position and size can be measured
    hidden: ndarray  # [F], invisible behind another object
    position: ndarray  # [F, 2]
    radius: ndarray  # [F]
    angle: ndarray  # [F], radians, unwrapped; 0 for shapes without a visible angle
    rgb: ndarray  # [F, 3], NaN where invisible
    same_shape: ndarray  # [F], where clean: the blob looks like `shape`
    lost: ndarray  # [F], share of its area hidden next to another object; 0 where clean


@dataclass(frozen=True, slots=True)
class Detections:
    """The ground and objects detected in a clip."""

    frames: int
    size: int
    backdrop: Backdrop
    tracks: tuple[Track, ...]


def find(frames: ndarray) -> Detections:
    """Detect ground and objects in uint8 frames [F, S, S, 3].

    ValueError for other frames, and for less than a second.
    """
    square = frames.ndim == 4 and frames.shape[1] == frames.shape[2] and frames.shape[3] == 3
    if frames.dtype != np.uint8 or not square:
        raise ValueError(
            f"frames {frames.dtype} {list(frames.shape)}:"
            " give uint8 [F, S, S, 3] with square frames"
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
    return Detections(len(frames), frames.shape[1], backdrop, tuple(tracks))


def link(blobs: Blobs, size: int) -> list[list[int]]:
    """Chain blob indices over time: blobs of one colour at any distance, then near ones."""
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
    """Return whether a chain is just mixed colour between blurred objects: small, never alone."""
    small = np.median(blobs.area[chain]) < BLEND * (size / 64) ** 2
    return bool(blobs.touching[chain].all() and small)


def _spread_out(values: ndarray, at: ndarray, frames: int) -> ndarray:
    """Interpolate values known at some frames linearly to all: [F] or [F, k]."""
    columns = [np.interp(np.arange(frames), at, column) for column in np.atleast_2d(values.T)]
    return np.stack(columns, axis=-1) if values.ndim == 2 else columns[0]


def _hidden(present: ndarray, touching: ndarray) -> ndarray:
    """Return the gaps [F] that begin and end next to another object."""
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
    if not whole.any():  # never seen alone: use all frames
        whole = np.ones(len(chain), dtype=bool)
    apart = apart if not (apart & ~whole).any() else whole
    shape = NAMES[int(np.minimum(distances[chain[apart]], 4).mean(axis=0).argmin())]
    present, clean, known, near = (np.zeros(frames, dtype=bool) for _ in range(4))
    present[at], clean[at[apart]], known[at[whole]], near[at] = True, True, True, touching
    hidden = _hidden(present, near)
    lost[hidden] = 1
    rgb, same = np.full((frames, 3), np.nan), np.zeros(frames, dtype=bool)
    rgb[at] = blobs.rgb[chain]
    to_shape = distances[chain[apart], NAMES.index(shape)]
    same[at[apart]] = to_shape <= distances[chain[apart]].min(axis=1) + ALIKE
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
    """Return the index of the front track for every pair of which one hides the other."""
    front = {}
    for one, other in combinations(range(len(tracks)), 2):
        lost = tracks[one].lost, tracks[other].lost
        both = (lost[0] != 0) | (lost[1] != 0)
        losses = [float(np.clip(each[both], 0, 1).max(initial=0)) for each in lost]
        if max(losses) > HIDES and max(losses) > 1.5 * min(losses):
            front[one, other] = one if losses[0] < losses[1] else other
    return front
