"""Near-identical keys of neighbouring frames merged (TempCache of FAST-AR)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..policy import Policy
from .merged_tokens import MergedTokens

if TYPE_CHECKING:
    from ..plan import MemoryPlan


@dataclass(frozen=True, slots=True)
class Merge(Policy):
    """Attend once to tokens whose keys stay the same from frame to frame.

    Each token takes over the most similar one of the frame before it if the cosine of their keys,
    of all heads as they are read, is at least `threshold`. The later key stands for both, with the
    mean of their values and the log of their count added to its scores: the same attention where
    the keys are equal. Above a threshold of 1 the run is that of the window, bit for bit.
    """

    name: ClassVar[str] = "merge"

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(
                f"merge with threshold {self.threshold:g}: give a cosine above 0; more than 1"
                " merges nothing"
            )

    def count_bytes(self, plan: "MemoryPlan") -> int:
        """See `refiner.memory.policy.Policy`."""
        return 0 if self.threshold > 1 else MergedTokens.count_bytes(plan)

    def start(self, plan: "MemoryPlan", device: torch.device | str) -> Policy:
        """See `refiner.memory.policy.Policy`."""
        return MergedTokens(self.threshold, plan)
