"""What a training pursues on the clips that its sampling path makes; one file an objective."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .distributed import averaged
from .learner import Learner
from .residuals import Residuals


@dataclass(frozen=True, slots=True)
class Samples:
    """Some of a step's clips [B, C, F, h, w], as the path made them: those of `rows` among the step's `total`."""

    clean: Tensor
    context: Tensor  # [B, L, text_dim]
    prompts: list[str]
    residuals: Residuals
    index: int  # of the step
    use: int  # of the step's random numbers
    rows: slice
    total: int
    weight: float  # in the step's mean


class Objective(Protocol):
    """What the sampling path is trained for."""

    ratio: int  # the path learns at every ratio-th step
    learners: Sequence[Learner]  # of what the objective itself has to learn

    def prepare(self, index: int, samples: Iterator[Samples]) -> dict[str, float]:
        """Learn what the objective itself has to; returns what is logged. `samples`, made as taken, have no graph."""
        ...

    def loss(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss of samples that have a graph, and what is logged."""
        ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None:
        """From a stage's state, of which the objective's is a part."""
        ...


class Means:
    """Figures of a step, as weighted means over its parts."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor], weight: float) -> None:
        for name, figure in figures.items():
            self.sums[name] = self.sums.get(name, 0) + weight * figure.detach().double()

    def floats(self) -> dict[str, float]:
        """By name, in the order of their first appearance; over all processes."""
        if not self.sums:
            return {}
        return dict(zip(self.sums, averaged(torch.stack([*self.sums.values()])).tolist(), strict=True))
