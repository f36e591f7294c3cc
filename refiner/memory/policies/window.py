"""The sliding window: every head attends to everything that the memory holds (Self-Forcing,
LongLive)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...wan.causal import KeyValue
from ..policy import Frames, Policy


@dataclass(frozen=True, slots=True)
class Window(Policy):
    """Attend to the sink, the recent frames and the chunk: one contiguous read without a copy."""

    name: ClassVar[str] = "window"
    copies: ClassVar[bool] = False
    static: ClassVar[bool] = True

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        return frames.all(layer)
