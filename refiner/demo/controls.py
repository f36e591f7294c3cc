"""Untrained residuals to compare a refiner with: noise that is only shrunk, and the base's own
flow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..memory.reflect import ReflectiveCache
from ..noise.refiner import HEAD, Refiner, merged
from ..schedule import Chunk, Level
from ..training.adapters import attach_branches, pairs_of
from ..wan.causal import CausalWan, KeyValue

Kind = Literal["shrunk", "towards x0", "hand-made"]


@dataclass(frozen=True, slots=True)
class Control:
    """A residual that nothing was trained for: Δ = -c ε, Δ = c (x0 - ε), or Δ = -c v with the
    base's flow v."""

    kind: Kind
    c: float

    def __str__(self) -> str:
        formula = {"shrunk": "-{} ε", "towards x0": "{} (x0 - ε)", "hand-made": "-{} v"}[self.kind]
        return f"Δ = {formula.format(f'{self.c:g}')}"

    def refiner(self, base: CausalWan, levels: Sequence[int]) -> "Refiner | ShrunkNoise":
        """The control on these nominal levels."""
        if self.kind == "hand-made":
            return hand_made(base, self.c, levels)
        return ShrunkNoise(self.c, self.kind == "towards x0", frozenset(levels))


@dataclass(frozen=True, slots=True)
class ShrunkNoise:
    """A refiner without a network: the same noise, less of it."""

    c: float
    towards_x0: bool
    levels: frozenset[int]
    cache: ReflectiveCache = field(default_factory=lambda: ReflectiveCache(previous="none"))

    def at(self, level: Level) -> bool:
        return level.step in self.levels

    def text(self, context_BLE: Tensor) -> None:
        """Nothing reads a prompt."""

    def residual(
        self, noise: Tensor, x0: Tensor, level: Level, chunk: Chunk, memory: object, text: list[KeyValue] | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Return Δ [B, C, F, h, w]; only `noise` and `x0` are read."""
        return self.c * ((x0 if self.towards_x0 else 0) - noise)


def hand_made(base: CausalWan, c: float, levels: Sequence[int]) -> Refiner:
    """T_φ whose head branch is A = the base's head, B = -c I, and whose other branches are zero."""
    tree = attach_branches(base, 1, silent_head=True, start="head")
    with torch.no_grad():
        head = tree.model.get_submodule(HEAD).lora_B["default"].weight
        head.copy_(-c * torch.eye(len(head)))
    return Refiner(
        merged(base, pairs_of(tree)), ReflectiveCache("shared", "joint"), frozenset(levels)
    )
