"""Flicker at the joins of chunks."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from .quality import flicker, ground_mask
from .track import find


def join_flicker(frames: ndarray, chunks: Sequence[int]) -> float:
    """Score the flicker beside joins, 0-100; NaN for one chunk.

    `frames` are uint8 [F, S, S, 3], `chunks` the latent frames of each chunk in order. Of a join,
    the last frame before it and the first one after it count.
    """
    joins = 4 * np.cumsum(chunks)[:-1] - 3  # first frame of each later chunk
    if not len(joins):
        return float("nan")
    beside = np.zeros(len(frames), dtype=bool)
    beside[joins] = beside[joins - 1] = True
    detections = find(frames)
    return flicker(frames, detections, ground_mask(detections), beside)
