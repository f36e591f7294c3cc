"""No memory at all: a call that sees its own frames and nothing else, in both directions (a
bidirectional model)."""

from torch import Tensor

from ..wan.causal import KeyValue
from ..wan.rope import rotate, span


class WholeClip:
    """A view (see refiner.wan.causal.View) of a clip of this many frames without a past; it keeps
    nothing."""

    first = 0

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
        """Every frame of the call sees every other."""
        return KeyValue(rotate(raw_key, table), value)
