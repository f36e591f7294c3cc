"""Which frames a memory holds, in which slot, and at which temporal position each is read."""

from collections.abc import Sequence

from .plan import MemoryPlan
from .policy import Held
from .positions import Cut, Placement, Relative


class FrameLedger:
    """Bookkeeping of a window: the sink, then the most recent frames, each in a slot of a ring
    behind the sink.

    Pure Python: slots and positions are known without touching a tensor, and nothing here grows
    with the video.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.held: list[Held] = []
        self.arrived = 0
        self.next_cut: Cut | None = (
            None  # places the next chunk, then positions are the plan's again
        )

    def slot(self, order: int) -> int:
        """Slot of the frame that arrived as number `order`: the sink first, then a ring over the
        oldest."""
        sink = self.plan.sink_frames
        return order if order < sink else sink + (order - sink) % self.plan.recent_frames

    def visible(self, new: int) -> list[Held]:
        """Past frames that a chunk of `new` frames sees, oldest first."""
        self.plan.check_chunk(new)
        return self._sink_and_last(self.plan.recent_frames - new)

    def place(self, frames: Sequence[int]) -> Placement:
        """Temporal positions of the past that a chunk of these absolute indices sees, and of the
        chunk."""
        past = self.visible(len(frames))
        sink = min(self.plan.sink_frames, len(past))
        positions = self.next_cut or self.plan.positions
        return positions.place([held.frame for held in past], frames, sink)

    def leaving(self, new: int) -> list[Held]:
        """Frames still held that a chunk of `new` frames overwrites."""
        visible = set(self.visible(new))
        return [held for held in self.held if held not in visible]

    def commit(self, frames: Sequence[int]) -> list[Held]:
        """Append a chunk; evict frames that no future chunk can attend to.

        Return the evicted frames that the chunk itself did not overwrite.
        """
        overwritten = self.leaving(len(frames))
        self.held += [Held(self.arrived + i, frame) for i, frame in enumerate(frames)]
        self.arrived += len(frames)
        self.next_cut = None
        evicted = [held for held in self.leaving(1) if held not in overwritten]
        self.held = self.visible(1)
        return evicted

    def flush(self, keep_last: int, keep_sink: bool = True) -> list[Held]:
        """Keep the sink and the last `keep_last` frames, renumbered from 0; return them as numbered
        before."""
        remaining = (
            self._sink_and_last(keep_last)
            if keep_sink
            else self.held[max(0, len(self.held) - keep_last) :]
        )
        self.held = [Held(order, held.frame) for order, held in enumerate(remaining)]
        self.arrived = len(remaining)
        return remaining

    def cut(self, cut: Cut) -> None:
        """Place the next chunk by a cut, far from its history; ValueError unless positions are
        relative."""
        if not isinstance(self.plan.positions, Relative):
            raise ValueError(
                "a cut moves the next chunk away from its history: it needs relative positions, this"
                f" run's are {self.plan.positions.name}"
            )
        self.next_cut = cut

    def _sink_and_last(self, recent: int) -> list[Held]:
        sink = min(self.plan.sink_frames, len(self.held))
        return self.held[:sink] + self.held[max(sink, len(self.held) - recent) :]
