"""Rolling Sink: the frames of the first window come back, backwards and forwards in turn."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..policy import Frames
from ..store import Slots
from .remembering import Remembered, Remembering

if TYPE_CHECKING:
    from ..plan import MemoryPlan


class Originals(Remembered):
    """Copies of one memory's first frames, which take the place of later ones."""

    copied: frozenset[int] = frozenset()  # orders of arrival
    replaced = 0  # all frames that arrived before this one

    def evicting(self, frames: Frames) -> None:
        walk = self.plan.window_frames - self.policy.recent
        ranks = {held.order: rank for rank, held in enumerate(frames.past) if held.order < walk}
        if new := [order for order in ranks if order not in self.copied]:
            self.remember(frames, [ranks[order] for order in new], new)
            self.copied |= {*new}

    def opening(self, frames: Frames) -> None:
        self.evicting(frames)
        walk = self.plan.window_frames - self.policy.recent
        first, last = max(walk, self.replaced), len(frames.past) - self.policy.recent
        ranks = [rank for rank in range(last) if frames.past[rank].order >= first]
        if ranks:
            turns = [divmod(frames.past[rank].order, walk) for rank in ranks]
            slots = [walk - 1 - place if turn % 2 else place for turn, place in turns]
            self.replace(frames, ranks, slots)
            self.replaced = frames.past[ranks[-1]].order + 1

    def flushed(self, keep_sink: bool) -> None:
        self.copied, self.replaced = frozenset(), 0


@dataclass(frozen=True, slots=True)
class RollingSink(Remembering):
    """Read the last `recent` frames as they are, and in the place of older ones, from the end of
    the first window on, copies of its frames. Inside that window this is full history."""

    name: ClassVar[str] = "rolling-sink"
    window: ClassVar[tuple[int, int]] = 21, 0
    State: ClassVar[type] = Originals

    recent: int = 3

    def check(self, plan: "MemoryPlan") -> None:
        if plan.evicts and not 0 < self.recent < plan.recent_frames:
            most = f"{plan.recent_frames - 1}, fewer than the window without its sink"
            raise ValueError(f"rolling-sink with recent {self.recent}: give 1 to {most}")

    def stores(self, plan: "MemoryPlan") -> list[Slots]:
        return [replace(plan.slots, frames=plan.window_frames - self.recent)]
