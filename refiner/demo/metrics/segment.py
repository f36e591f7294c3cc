"""Segment frames: the ground, and the connected regions (blobs) of each object colour.

F frames, S frame side in pixels, N pixels that belong to a blob, B blobs of all frames together.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from ..palette import GROUND_COLOURS, OBJECT_COLOURS, table
from ..render import lower_share

# Areas are in pixels at 64×64.
CONTRAST = 40  # levels from the ground, over three channels, from which a pixel is an object's
TWO_TONES = 30  # levels between the tones of a ground that has two
CORE = 8  # smallest core of a colour that counts as present
SLIVER = 8  # frames around one with a core, in which a colour may appear without one
SPECK = 4  # smaller regions are noise
SMALLEST = 14  # smaller blobs that touch no other are no objects
ORDERS = (3, 4, 5)  # angular harmonics that distinguish the shapes
COLOURS = tuple(OBJECT_COLOURS)


@dataclass(frozen=True, slots=True)
class Backdrop:
    """The detected ground: its name, the end of its upper tone in frame sides, tones by frame."""

    name: str
    split: float
    tones: ndarray  # [F, 2, 3], upper and lower, in 0–255

    def rows(self, size: int) -> ndarray:
        """Return the colour by frame and row, float32 [F, size, 3]."""
        share = lower_share(self.split, size)
        return (self.tones[:, :1] * (1 - share) + self.tones[:, 1:] * share).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Blobs:
    """Connected regions of one colour; lengths in pixels, `area` weighted by coverage."""

    frame: ndarray  # [B]
    colour: ndarray  # [B], index into COLOURS
    area: ndarray  # [B]
    centre: ndarray  # [B, 2], x and y
    rgb: ndarray  # [B, 3], of the inner pixels
    spread: ndarray  # [B], second moment over that of a disc of this area, times 1/2
    harmonics: ndarray  # [B, 3], complex: mean of (z / radius)^k over the region, for k of ORDERS
    touching: ndarray  # [B], next to a blob of another colour

    def pick(self, chosen: ndarray) -> "Blobs":
        """Select blobs by index or mask."""
        return Blobs(*(getattr(self, field)[chosen] for field in self.__slots__))


def find_backdrop(frames: ndarray) -> Backdrop:
    """Detect the ground from the outermost two rows and columns, which objects rarely reach."""
    size = frames.shape[1]
    columns = frames[:, :, (0, 1, -2, -1)]  # [F, S, 4, 3]
    profile = np.median(columns.reshape(len(frames), size, -1, 3), axis=(0, 2))  # [S, 3]
    total, places = profile.cumsum(axis=0), np.arange(1, size)
    above, below = total[:-1] / places[:, None], (total[-1] - total[:-1]) / (size - places)[:, None]
    between = ((above - below) ** 2).sum(axis=1) * places * (size - places)
    margin = size // 8
    place = int(between[margin:-margin].argmax()) + margin + 1
    ring = frames[:, (0, 1, -2, -1)].reshape(len(frames), 4 * size, 3)
    upper = np.concatenate(
        [columns[:, : place - 3].reshape(len(frames), -1, 3), ring[:, : 2 * size]], axis=1
    )
    lower = np.concatenate(
        [columns[:, place + 3 :].reshape(len(frames), -1, 3), ring[:, 2 * size :]], axis=1
    )
    tones = np.stack([np.median(half, axis=1) for half in (upper, lower)], axis=1)
    top, bottom = np.median(tones, axis=0)
    step = bottom - top
    if np.linalg.norm(step) < TWO_TONES:
        both = np.median(np.concatenate([upper, lower], axis=1), axis=1)
        return Backdrop(_nearest_tone(np.median(both, axis=0)), 0.5, np.stack([both, both], axis=1))
    share = np.clip((profile - top) @ step / (step @ step), 0, 1)
    name = f"{_nearest_tone(top)} over {_nearest_tone(bottom)}"
    return Backdrop(name, float(1 - share.mean()), tones)


def _nearest_tone(rgb: ndarray) -> str:
    return list(GROUND_COLOURS)[int(((table(GROUND_COLOURS) - rgb) ** 2).sum(axis=1).argmin())]


def _next_to(labels: ndarray) -> list[ndarray]:
    """Return the labels left, right, above and below each pixel; 0 outside the frame."""
    around = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
    return [around[:, 1:-1, :-2], around[:, 1:-1, 2:], around[:, :-2, 1:-1], around[:, 2:, 1:-1]]


def _mismatch(off_ground: ndarray, ground: ndarray) -> ndarray:
    """Return each pixel's squared distance [N, 7] to ground mixed with at least 0.1 of a colour."""
    step = table(OBJECT_COLOURS)[:, None] - ground  # [7, N, 3]
    along, length = np.einsum("cnk,nk->cn", step, off_ground), np.einsum("cnk,cnk->cn", step, step)
    mix = np.clip(along / length, 0.1, 1)
    return ((off_ground**2).sum(axis=1) - 2 * mix * along + mix**2 * length).T


def _about(present: ndarray) -> ndarray:
    """Return the colours present within SLIVER frames [F, 7], as slivers have no core."""
    padded = np.pad(present, ((SLIVER, SLIVER), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * SLIVER + 1, axis=0).any(axis=-1)


def label_pixels(frames: ndarray, off_ground: ndarray, rows: ndarray) -> tuple[ndarray, ndarray]:
    """Label pixels by colour.

    Returns uint8 [F, S, S], 0 for ground and 1 + index of the colour, and the clip's mean colours,
    float [F, 7, 3].
    """
    count, size = frames.shape[:2]
    distance = np.sqrt(np.einsum("fyxk,fyxk->fyx", off_ground, off_ground))
    where = np.nonzero(distance > CONTRAST)
    mismatch = _mismatch(off_ground[where], rows[where[:2]])
    labels = np.zeros((count, size, size), dtype=np.uint8)
    labels[where] = mismatch.argmin(axis=1) + 1
    inner = np.logical_and.reduce([side == labels for side in _next_to(labels)])[where]
    key = where[0][inner] * len(COLOURS) + labels[where][inner] - 1
    cores = np.bincount(key, minlength=count * len(COLOURS)).reshape(count, -1)
    present = _about(cores >= CORE * (size / 64) ** 2)
    mismatch[~present[where[0]]] = np.inf
    labels[where] = np.where(present.any(axis=1)[where[0]], mismatch.argmin(axis=1) + 1, 0)
    pixels = frames[where][inner].astype(np.float32)
    return labels, _colours(pixels, distance[where][inner], key, count)


def _colours(pixels: ndarray, weight: ndarray, key: ndarray, count: int) -> ndarray:
    """Average pixels by frame and label, weighted to those farthest from the ground.

    Labels without pixels have the palette's colour.
    """
    weight = (weight / 255).astype(np.float64) ** 8
    slots = count * len(COLOURS)
    total = np.bincount(key, weight, slots)
    sums = np.stack([np.bincount(key, weight * pixels[:, k], slots) for k in range(3)], axis=1)
    colours = np.where(
        total[:, None] > 0,
        sums / np.maximum(total, 1e-12)[:, None],
        np.tile(table(OBJECT_COLOURS), (count, 1)),
    )
    return colours.reshape(count, len(COLOURS), 3).astype(np.float32)


def components(labels: ndarray) -> ndarray:
    """Number the 4-connected regions of one label in a frame: int [F, S, S], −1 on the ground."""
    flat = labels.reshape(-1, labels.shape[-1])
    starts = np.ones(flat.shape, dtype=bool)
    starts[:, 1:] = flat[:, 1:] != flat[:, :-1]
    runs = (starts.cumsum().reshape(labels.shape)) - 1
    pairs = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] > 0)
    count = int(runs.max()) + 1
    edges = np.divmod(np.unique(runs[:, :-1][pairs] * count + runs[:, 1:][pairs]), count)
    parent = np.arange(count)
    while True:
        first, second = parent[edges[0]], parent[edges[1]]
        if (first == second).all():
            return np.where(labels > 0, parent[runs], -1)
        np.minimum.at(parent, np.maximum(first, second), np.minimum(first, second))
        while (parent[parent] != parent).any():
            parent = parent[parent]


def _regions(labels: ndarray) -> tuple[ndarray, ndarray]:
    """Number connected regions without specks; returns numbers [F, S, S] and labels.

    They are grown by the one-pixel rim that the ground mixes into; −1 is ground.
    """
    name = components(labels)
    pixels = np.bincount(name[name >= 0], minlength=1)
    name[(name >= 0) & (pixels[name] < SPECK * (labels.shape[1] / 64) ** 2)] = -1
    colour = np.zeros(len(pixels) + 1, dtype=np.uint8)  # by region; the last is the ground's
    colour[name[name >= 0]] = labels[name >= 0]
    name = np.where(name < 0, np.maximum.reduce(_next_to(name + 1)) - 1, name)
    return name, colour[name]


def find_blobs(frames: ndarray, backdrop: Backdrop) -> Blobs:
    """Find the blobs of uint8 frames [F, S, S, 3]; regions of one colour that touch others join."""
    size = frames.shape[1]
    rows = backdrop.rows(size)
    off_ground = frames - rows[:, :, None]
    labels, colours = label_pixels(frames, off_ground, rows)
    name, labels = _regions(labels)
    where = np.nonzero(labels)
    touching = [(side != labels) & (side > 0) for side in _next_to(labels)]
    touch = np.logical_or.reduce(touching)[where]
    name, label = name[where], labels[where].astype(np.int64) - 1
    touched = np.zeros(name.max(initial=0) + 1, dtype=bool)
    touched[name[touch]] = True
    joined = len(touched) + where[0] * len(COLOURS) + label
    _, name = np.unique(np.where(touched[name], joined, name), return_inverse=True)
    step = colours[where[0], label] - rows[where[:2]]
    along, length = (np.einsum("nk,nk->n", step, other) for other in (off_ground[where], step))
    alpha = np.clip(along / np.maximum(length, 1), 0, 1)
    blobs = _measure(name, where, alpha, label, colours, touch)
    large = blobs.area >= SMALLEST * (size / 64) ** 2
    return blobs.pick(large | (blobs.touching & (blobs.area > 2)))


def _measure(
    name: ndarray, where: tuple[ndarray, ...], alpha: ndarray, label: ndarray, colours: ndarray,
    touch: ndarray,
) -> Blobs:  # fmt: skip
    """Compute the blobs' moments from their pixels' blob number, place, coverage and label."""

    def total(values: ndarray) -> ndarray:
        return np.bincount(name, values)

    area = np.maximum(total(alpha), 1e-6)
    first = np.unique(name, return_index=True)[1]
    frame, colour = where[0][first], label[first]
    x, y = where[2] + 0.5, where[1] + 0.5
    centre = np.stack([total(alpha * x) / area, total(alpha * y) / area], axis=1)
    z = (x - centre[name, 0]) + 1j * (y - centre[name, 1])
    z /= np.sqrt(area / np.pi)[name]
    spread = total(alpha * (z.real**2 + z.imag**2)) / area
    powers = [alpha * z**3]
    for _ in ORDERS[1:]:
        powers.append(powers[-1] * z)
    harmonics = np.stack([(total(p.real) + 1j * total(p.imag)) / area for p in powers], axis=1)
    rgb, touching = colours[frame, colour], total(touch.astype(float)) > 0
    return Blobs(frame, colour, area, centre, rgb, spread, harmonics, touching)
