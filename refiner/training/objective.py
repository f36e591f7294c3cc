"""What a training pursues on the clips that its sampling path makes; one file an objective."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .distributed import averaged
from .learner import Learner
from .residuals import Residuals


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a step's clips, before they are made: those of `rows` among the step's `total`."""

    path: Tensor  # noises [levels, B, C, F, h, w]
    exit_level: int  # index of the level that all stop at
    context: Tensor  # [B, L, text_dim]
    prompts: tuple[str, ...]
    index: int  # of the step
    use: int  # of the step's random numbers
    rows: slice
    total: int
    weight: float  # in the step's mean
    scored_at: tuple[Tensor, Tensor] | None = None  # noises and sigmas; None: the objective's own


class Objective(Protocol):
    """What the sampling path is trained for."""

    ratio: int  # the path learns at every ratio-th step
    learners: Sequence[Learner]  # of what the objective itself has to learn

    def prepare(self, index: int, samples: Iterator[tuple[Part, Tensor]]) -> dict[str, float]:
        """Learn what the objective itself has to; returns what is logged. `samples`, parts and
        their clips [B, C, F, h, w], are made as taken and have no graph."""
        ...

    def given(self, part: Part) -> tuple[Sequence[Tensor], dict[str, Hashable]]:
        """What `loss` takes besides clips: tensors, as of random numbers, and other things by
        name."""
        ...

    def loss(
        self,
        clean: Tensor,
        context: Tensor,
        residuals: Residuals,
        *tensors: Tensor,
        **others: Hashable,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss of clips [B, C, F, h, w] that have a graph, and what is logged; a function as
        Replay asks for, unless its training is not replayed."""
        ...

    def improvement(self, before: Tensor, after: Tensor, part: Part) -> float:
        """How much better clips `after` [B, C, F, h, w] are than `before`, of the same prompts and
        noises."""
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
        return dict(
            zip(self.sums, averaged(torch.stack([*self.sums.values()])).tolist(), strict=True)
        )
