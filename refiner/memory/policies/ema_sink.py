"""EMA sink (Reward Forcing): frames that leave the window are averaged into the sink."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from ..policy import Frames
from ..store import Slots
from .remembering import Remembered, Remembering

if TYPE_CHECKING:
    from ..plan import MemoryPlan


class SinkAverage(Remembered):
    """The averages of one memory; a leaving frame goes to the sink frame of the same place."""

    begun = False  # whether the sink has been copied

    def evicting(self, frames: Frames) -> None:
        sink, gain = self.plan.sink_frames, 1 - self.policy.retain
        for layer in range(self.plan.layers):
            for mean, leaving in zip(self.own.prefix(layer, sink), frames.all(layer), strict=True):
                for rank, held in enumerate(frames.past):
                    frame = self.frame(leaving, rank).float()
                    self.frame(mean, held.order % sink).lerp_(frame, gain)

    def opening(self, frames: Frames) -> None:
        sink = range(self.plan.sink_frames)
        if len(sink) <= len(frames.past):
            (self.replace if self.begun else self.remember)(frames, sink, sink)
            self.begun = True

    def flushed(self, keep_sink: bool) -> None:
        self.begun &= keep_sink


@dataclass(frozen=True, slots=True)
class EmaSink(Remembering):
    """Average what leaves into the sink: S ← retain · S + (1 − retain) · K, keys before RoPE and
    values, in fp32. With retain 1 the sink stays as it is, and the run is that of the window."""

    name: ClassVar[str] = "ema-sink"
    window: ClassVar[tuple[int, int]] = 12, 3
    positions: ClassVar[str] = "sink-adjacent"
    State: ClassVar[type] = SinkAverage

    retain: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.retain <= 1:
            raise ValueError(f"ema-sink with retain {self.retain}: give 0 to 1, like 0.99")

    def check(self, plan: "MemoryPlan") -> None:
        if plan.evicts and not plan.sink_frames:
            raise ValueError("memory ema-sink needs a sink, and this run has none: give --sink 3")

    def stores(self, plan: "MemoryPlan") -> list[Slots]:
        return [replace(plan.slots, frames=plan.sink_frames, dtype=torch.float32)]
