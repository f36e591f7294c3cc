"""A clip and its caption to scores: every row of the table, 0–100."""

from dataclasses import astuple, dataclass

import numpy as np
from numpy import ndarray

from ..captions import Caption
from .quality import quality_rows
from .semantic import semantic_rows
from .track import find

SEMANTIC = ("object", "colour", "count", "relation", "action")
QUALITY = ("smoothness", "flicker", "subject", "background", "imaging", "dynamic", "drift")
ROWS = (*SEMANTIC, *QUALITY)


@dataclass(frozen=True, slots=True)
class ClipScores:
    """The rows of one clip, 0–100, higher is better; NaN is what its caption does not state."""

    object: float
    colour: float
    count: float
    relation: float
    action: float
    smoothness: float
    flicker: float
    subject: float
    background: float
    imaging: float
    dynamic: float
    drift: float

    @property
    def array(self) -> ndarray:
        """The scores in the order of ROWS."""
        return np.array(astuple(self))


def evaluate_clip(frames: ndarray, caption: Caption) -> ClipScores:
    """Scores of decoded frames, uint8 [F, S, S, 3], against what the caption states. The clip's
    truth is not used."""
    found = find(frames)
    return ClipScores(
        *astuple(semantic_rows(found, caption)), *astuple(quality_rows(frames, found))
    )
