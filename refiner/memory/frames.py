"""Bookkeeping of a memory: which frames it holds, their slots and their temporal positions."""

from collections.abc import Sequence

from .plan import MemoryPlan
from .policy import Held
from .positions import Cut, Placement, check_cut


class FrameLedger:
    """The frames of a window: the sink, then the most recent frames in a ring of slots.

    Pure Python: slots and positions need no tensor, and nothing grows with the video.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.held: list[Held] = []
        self.arrived = 0
        self.next_cut: Cut | None = None  # places the next chunk only

    def slot(self, order: int) -> int:
        """Return the slot of the frame that arrived as number `order`."""
        sink = self.plan.sink_frames
        return order if order < sink else sink + (order - sink) % self.plan.recent_frames

    def visible(self, new: int) -> list[Held]:
        """Return the past frames that a chunk of `new` frames attends to, oldest first."""
        self.plan.check_chunk(new)
        return self._sink_and_last(self.plan.recent_frames - new)

    def place(self, frames: Sequence[int]) -> Placement:
        """Return positions of the visible past, and of a chunk of these absolute indices."""
        past = self.visible(len(frames))
        sink = min(self.plan.sink_frames, len(past))
        positions = self.next_cut or self.plan.positions
        return positions.place([held.frame for held in past], frames, sink)

    def leaving(self, new: int) -> list[Held]:
        """Return the held frames that a chunk of `new` frames overwrites."""
        visible = set(self.visible(new))
        return [held for held in self.held if held not in visible]

    def make_room(self, new: int) -> None:
        """Forget the frames that a pass over `new` frames overwrites."""
        self.held = self.visible(new)

    def commit(self, frames: Sequence[int]) -> list[Held]:
        """Append a chunk; evict frames that no future chunk can attend to.

        Return the evicted frames, without those that the chunk itself has overwritten.
        """
        overwritten = self.leaving(len(frames))
        self.held += [Held(self.arrived + i, frame) for i, frame in enumerate(frames)]
        self.arrived += len(frames)
        self.next_cut = None
        evicted = [held for held in self.leaving(1) if held not in overwritten]
        self.held = self.visible(1)
        return evicted

    def flush(self, keep_last: int, keep_sink: bool = True) -> list[Held]:
        """Keep the sink and the last `keep_last` frames, renumbered; return them as before."""
        remaining = self.held[max(0, len(self.held) - keep_last) :]
        if keep_sink:
            remaining = self._sink_and_last(keep_last)
        self.held = [Held(order, held.frame) for order, held in enumerate(remaining)]
        self.arrived = len(remaining)
        return remaining

    def cut(self, cut: Cut) -> None:
        """Place the next chunk by a cut; ValueError unless positions are relative."""
        check_cut(self.plan.positions)
        self.next_cut = cut

    def _sink_and_last(self, recent: int) -> list[Held]:
        sink = min(self.plan.sink_frames, len(self.held))
        return self.held[:sink] + self.held[max(sink, len(self.held) - recent) :]
