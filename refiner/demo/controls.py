"""Untrained residuals to compare a refiner with: shrunk noise, and the base's flow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..memory.reflect import Previous, ReflectiveCache
from ..noise.refiner import HEAD, Refiner, merged
from ..schedule import Chunk, Level
from ..training.adapters import attach_branches, pairs_of
from ..wan.causal import CausalWan, KeyValue

Kind = Literal["shrunk", "towards x0", "hand-made"]
FORMULAS: dict[Kind, str] = {"shrunk": "-{} ε", "towards x0": "{} (x0 - ε)", "hand-made": "-{} v"}


@dataclass(frozen=True, slots=True)
class Control:
    """An untrained residual: Δ = -c ε, Δ = c (x0 - ε), or Δ = -c v with the base's flow v."""

    kind: Kind
    c: float
    previous: Previous = "joint"  # how a hand-made one sees the previous x0

    def __str__(self) -> str:
        formula = FORMULAS[self.kind].format(f"{self.c:g}")
        return f"Δ = {formula}" if self.previous == "joint" else f"Δ = {formula}, {self.previous}"

    def refiner(self, base: CausalWan, levels: Sequence[int]) -> "Refiner | ShrunkNoise":
        """Return the control as a refiner of these nominal levels."""
        if self.kind == "hand-made":
            return hand_made(base, self.c, levels, self.previous)
        return ShrunkNoise(self.c, self.kind == "towards x0", frozenset(levels))


@dataclass(frozen=True, slots=True)
class ShrunkNoise:
    """A refiner without a network that shrinks the noise."""

    c: float
    towards_x0: bool
    levels: frozenset[int]
    cache: ReflectiveCache = field(default_factory=lambda: ReflectiveCache(previous="none"))

    def at(self, level: Level) -> bool:
        return level.step in self.levels

    def text(self, context_BLE: Tensor, batch: int | None = None) -> None:
        """Ignore the prompt."""

    def residual(
        self, noise: Tensor, x0: Tensor, level: Level, chunk: Chunk, memory: object,
        text: list[KeyValue] | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Return Δ [B, C, F, h, w] from `noise` and `x0` alone."""
        return self.c * ((x0 if self.towards_x0 else 0) - noise)


def hand_made(base: CausalWan, c: float, levels: Sequence[int], previous: Previous) -> Refiner:
    """Return T_φ with Δ = -c v: head branch A = the base's head, B = -c I; other branches zero."""
    tree = attach_branches(base, 1, silent_head=True, start="head")
    with torch.no_grad():
        head = tree.model.get_submodule(HEAD).lora_B["default"].weight
        head.copy_(-c * torch.eye(len(head)))
    cache = ReflectiveCache("shared", previous)
    return Refiner(merged(base, pairs_of(tree)), cache, frozenset(levels))
