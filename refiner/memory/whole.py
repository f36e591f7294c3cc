"""No memory: bidirectional attention within a whole clip."""

from torch import Tensor

from ..wan.causal import KeyValue
from ..wan.rope import rotate, span


class WholeClip:
    """A view of a clip of this many frames without a past (see `refiner.wan.causal.View`)."""

    first = 0
    frequencies = None

    def __init__(self, frames: int) -> None:
        self.positions = span(0, frames)

    def extend(
        self,
        layer: int,
        raw_key: Tensor,
        value: Tensor,
        table: Tensor,
        raw_query: Tensor | None = None,
    ) -> KeyValue:
        """Let every frame attend to every other."""
        return KeyValue(rotate(raw_key, table), value)
