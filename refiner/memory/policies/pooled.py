"""Pooled history (LiveAct, FAR): frames that left the window, a block of them as one frame."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from ...wan.causal import KeyValue
from ..policy import Frames
from ..store import Slots
from .remembering import Remembered, Remembering

if TYPE_CHECKING:
    from ..plan import MemoryPlan


class Averages(Remembered):
    """Averages of blocks, oldest first, each by layer; the own slot sums an unfinished block."""

    blocks: tuple[list[KeyValue], ...] = ()
    summed = 0  # frames

    def evicting(self, frames: Frames) -> None:
        pool, layers = self.policy.pool, range(self.plan.layers)
        for rank in range(len(frames.past)):
            for layer in layers:
                self.add(layer, frames.stored(layer, [rank]), first=not self.summed)
            self.summed = (self.summed + 1) % pool
            if not self.summed:
                block = [self.average(layer, pool) for layer in layers]
                self.blocks = (*self.blocks, block)[-self.policy.blocks :]

    def read(self, layer: int, raw_query_BNHD: torch.Tensor, frames: Frames) -> KeyValue:
        return self.insert(layer, frames, [block[layer] for block in self.blocks])

    def flushed(self, keep_sink: bool) -> None:
        self.blocks, self.summed = (), 0


@dataclass(frozen=True, slots=True)
class Pooled(Remembering):
    """Read averages of `pool` frames of what left the window, the last `blocks` of them. With a
    pool of 1 nothing is averaged, so nothing is added. (LiveAct pools tokens of a frame.)"""

    name: ClassVar[str] = "pooled"
    copies: ClassVar[bool] = True
    window: ClassVar[tuple[int, int]] = 12, 3
    positions: ClassVar[str] = "sink-adjacent"
    State: ClassVar[type] = Averages

    pool: int = 5
    blocks: int = 4

    def __post_init__(self) -> None:
        if self.pool < 1 or self.blocks < 1:
            raise ValueError(f"pooled with pool {self.pool}, blocks {self.blocks}: give 1 or more")

    def stores(self, plan: "MemoryPlan") -> list[Slots]:
        sums = replace(plan.slots, frames=1, dtype=torch.float32)
        return [sums, replace(plan.slots, frames=self.blocks)] if self.pool > 1 else []
