"""Forcing-KV: static heads read near frames alone, dynamic ones what changes between them, too."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from ..heads import HeadList
from ..policy import Policy
from .head_reader import HeadReader, most_segments

if TYPE_CHECKING:
    from ..plan import MemoryPlan


@dataclass(frozen=True, slots=True)
class HeadWindows(Policy):
    """Static heads attend to sink, last frames and chunk; dynamic ones to a share of the rest, too.

    That is, of `segments` in each other frame, the share `ratio` whose keys differ most from those
    of the next frame (in Forcing-KV of one compressed frame and the newest ones, here of all that
    are held). Layer 0 reads everything. Without static heads, ratio 1 is the window, bit for bit.
    """

    name: ClassVar[str] = "head-windows"

    heads: str = ""  # file of `autorefiner calibrate`; without one all heads are dynamic
    segments: int = 6  # of equal size: fewer where the tokens of a frame demand it
    ratio: float = 0.33
    sink: int = 1
    recent: int = 1
    listed: HeadList | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1 or min(self.segments, self.recent) < 1 or self.sink < 0:
            raise ValueError(
                f"head-windows with segments {self.segments}, ratio {self.ratio}, sink {self.sink},"
                f" recent {self.recent}: give a ratio from 0 to 1, a sink of 0 or more, the others"
                " at least 1"
            )
        listed = HeadList.read(Path(self.heads)) if self.heads else None
        object.__setattr__(self, "listed", listed)

    def check(self, plan: "MemoryPlan") -> None:
        if self.listed:
            self.listed.check(plan.layers, plan.heads, self.heads)

    def count_bytes(self, plan: "MemoryPlan") -> int:
        return 8 * (plan.layers * plan.heads + plan.batch * self.share(plan, plan.window_frames))

    def scratch_bytes(self, plan: "MemoryPlan", queries: int) -> int:
        return 16 * plan.layer_bytes // plan.dtype.itemsize  # a layer's keys, four times in fp32

    def share(self, plan: "MemoryPlan", frames: int) -> int:
        """Count the segments that dynamic heads read of so many frames."""
        return round(frames * most_segments(plan.frame_tokens, self.segments) * self.ratio)

    def start(self, plan: "MemoryPlan", device: torch.device | str) -> HeadReader:
        return HeadReader(self, plan, torch.device(device))
