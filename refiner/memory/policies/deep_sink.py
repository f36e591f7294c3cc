"""Deep sink (Deep Forcing): a long sink, the best tokens of the middle, and the last frames."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..policy import Policy
from .top_tokens import TopTokens

if TYPE_CHECKING:
    from ..plan import MemoryPlan


@dataclass(frozen=True, slots=True)
class DeepSink(Policy):
    """Attend to what `budget` past frames take: first `sink`, last `recent`, best tokens between.

    The chunk's own queries choose the tokens (in the paper, those of the recent frames). They and
    the sink are read right before the recent frames, so the sink's distance is constant. While no
    more than `budget` frames are held, the run is that of the window, bit for bit.
    """

    name: ClassVar[str] = "deep-sink"
    raw: ClassVar[bool] = True
    window: ClassVar[tuple[int, int]] = (21, 10)
    positions: ClassVar[str] = "sink-adjacent"

    budget: int = 16
    sink: int = 10
    recent: int = 4

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 0 or self.budget <= self.sink + self.recent:
            raise ValueError(
                f"deep-sink with budget {self.budget}, sink {self.sink}, recent {self.recent}:"
                " give a budget larger than sink + recent, and those 0 or more"
            )

    def check(self, plan: "MemoryPlan") -> None:
        """See `refiner.memory.policy.Policy`."""
        if plan.evicts and plan.sink_frames < self.sink and self.budget < plan.window_frames:
            raise ValueError(
                f"deep-sink reads a sink of {self.sink} frames and the window keeps"
                f" {plan.sink_frames}: use a sink of {self.sink}, or lower the knob sink"
            )

    def count_bytes(self, plan: "MemoryPlan") -> int:
        """See `refiner.memory.policy.Policy`."""
        frames = self.budget - self.sink - self.recent
        never = self.budget >= plan.window_frames
        return 0 if never else TopTokens.count_bytes(plan, frames)

    def start(self, plan: "MemoryPlan", device: torch.device | str) -> TopTokens:
        """See `refiner.memory.policy.Policy`."""
        return TopTokens(self, plan)
