"""Score a clip against its caption: every row of the table, 0–100."""

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
    """A clip's scores, 0–100, higher is better; NaN for what its caption does not state."""

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
    """Score uint8 frames [F, S, S, 3] against the caption alone, without the clip's truth."""
    detections = find(frames)
    semantic, quality = semantic_rows(detections, caption), quality_rows(frames, detections)
    return ClipScores(*astuple(semantic), *astuple(quality))
