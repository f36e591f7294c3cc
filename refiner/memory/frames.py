"""Which frames a memory holds, in which slot, and at which temporal position each is read."""

from collections.abc import Sequence
from typing import NamedTuple

from ..wan.rope import span
from .plan import MemoryPlan


class Held(NamedTuple):
    """A committed frame: its number in the order of arrival, and its absolute latent index in the video."""

    order: int
    frame: int


class FrameLedger:
    """Bookkeeping of a window: the sink, then the most recent frames, each in a slot of a ring behind the sink.

    Pure Python: slots and positions are known without touching a tensor, and nothing here grows with the video.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.held: list[Held] = []
        self.arrived = 0
        self.jump: int | None = None  # temporal position of the next chunk after a cut

    def slot(self, order: int) -> int:
        """Of the frame that arrived as number `order`; the sink first, then a ring that overwrites the oldest."""
        sink = self.plan.sink_frames
        return order if order < sink else sink + (order - sink) % self.plan.recent_frames

    def visible(self, new: int) -> list[Held]:
        """Past frames that a chunk of `new` frames sees, oldest first."""
        self.plan.check_chunk(new)
        return self._sink_and_last(self.plan.recent_frames - new)

    def positions(self, frames: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Temporal positions (of the visible past, of the chunk `frames`), each oldest first."""
        past = self.visible(len(frames))
        if self.plan.positions == "absolute":
            return tuple(held.frame for held in past), tuple(frames)
        return span(0, len(past)), span(len(past) if self.jump is None else self.jump, len(frames))

    def commit(self, frames: Sequence[int]) -> None:
        """Add a chunk to the past and drop what not even a chunk of one frame could still see."""
        self.held += [Held(self.arrived + i, frame) for i, frame in enumerate(frames)]
        self.arrived += len(frames)
        self.jump = None
        self.held = self.visible(1)

    def flush(self, keep_last: int) -> list[Held]:
        """Keep the sink and the last `keep_last` frames, renumbered from 0; returns them as they were numbered."""
        kept = self._sink_and_last(keep_last)
        self.held = [Held(order, held.frame) for order, held in enumerate(kept)]
        self.arrived = len(kept)
        return kept

    def cut(self, jump: int) -> None:
        """Let the next chunk stand at temporal position `jump`, far from its history (Infinity-RoPE's RoPE cut)."""
        if self.plan.positions != "window":
            raise ValueError(
                "a cut moves the next chunk away from its history: it needs keys='raw', positions='window'"
            )
        self.jump = jump

    def _sink_and_last(self, recent: int) -> list[Held]:
        sink = min(self.plan.sink_frames, len(self.held))
        return self.held[:sink] + self.held[max(sink, len(self.held) - recent) :]
