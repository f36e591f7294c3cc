"""The interface of training objectives on sampled clips; each objective is one file."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .distributed import averaged
from .learner import Learner
from .residuals import Residuals


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Inputs of some of a step's clips: those in `rows` of the step's `total`."""

    path: Tensor  # noises [levels, B, C, F, h, w]
    exit_level: int  # index of the level that all clips stop at
    context: Tensor  # [B, L, text_dim]
    prompts: tuple[str, ...]
    index: int  # step
    use: int  # key of the step's random stream
    rows: slice
    total: int
    weight: float  # in the step's mean
    scored_at: tuple[Tensor, Tensor] | None = None  # noises, sigmas; None: the objective draws them


class Objective(Protocol):
    """A loss on sampled clips, with the networks that it trains along."""

    ratio: int  # the path learns at every ratio-th step
    learners: Sequence[Learner]  # the objective's networks in training

    def prepare(self, index: int, samples: Iterator[tuple[MicroBatch, Tensor]]) -> dict[str, float]:
        """Update the objective's networks; returns the figures to log.

        `samples` are micro-batches with clips [B, C, F, h, w], sampled lazily and without a graph.
        """
        ...

    def loss_arguments(self, batch: MicroBatch) -> tuple[Sequence[Tensor], dict[str, Hashable]]:
        """Return extra arguments for loss(): tensors (graph inputs) and hashable constants."""
        ...

    def loss(
        self,
        clean: Tensor,
        context: Tensor,
        residuals: Residuals,
        *tensors: Tensor,
        **others: Hashable,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of clips [B, C, F, h, w] that have a graph, and the figures to log.

        Must be a function as Replay requires, unless the training is not replayed.
        """
        ...

    def improvement(self, before: Tensor, after: Tensor, batch: MicroBatch) -> float:
        """Return how much better clips `after` [B, C, F, h, w] are than `before`.

        Both have the micro-batch's prompts and noises.
        """
        ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None:
        """Read the objective's entries of a stage's state."""
        ...


class Means:
    """A step's figures as weighted means over its micro-batches."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor], weight: float) -> None:
        for name, figure in figures.items():
            self.sums[name] = self.sums.get(name, 0) + weight * figure.detach().double()

    def floats(self) -> dict[str, float]:
        """Return the means over all processes by name, in order of first appearance."""
        if not self.sums:
            return {}
        means = averaged(torch.stack([*self.sums.values()])).tolist()
        return dict(zip(self.sums, means, strict=True))
