"""The record of a sampling method: its generator, and what progress bars and estimates ask."""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..memory.reflect import ReflectiveCache
from ..rollout import Rollout
from ..schedule import Chunk, Level, Preset


def one_a_level(chunk: Chunk) -> int:
    """Count one prediction for each level."""
    return len(chunk.levels)


def no_caches(levels: Sequence[Level]) -> tuple[Hashable, ...]:
    """Return no names: the main memory is enough."""
    return ()


def any_run(preset: Preset, cache: ReflectiveCache | None) -> None:
    """Accept every preset and refiner."""


def no_note(levels: Sequence[int], refined: Collection[int]) -> str | None:
    """Return None: the method always has something to do."""
    return None


@dataclass(frozen=True, slots=True)
class Method:
    """A sampling method with its knobs set, made by a function of `SAMPLERS` or `SEARCHES`.

    `run` yields the x0 [B, C, F, h, w] of each chunk. `passes` counts the predictions of a chunk,
    at most; without `exact` there may be fewer. `caches` names memories besides the main one.
    `check` raises ValueError for a preset or a refiner's cache that the method cannot run with.
    `note` returns a warning if the method, or a refiner, does nothing at these nominal levels, of
    which some are refined.
    """

    name: str
    run: Callable[[Rollout], Iterator[Tensor]]
    passes: Callable[[Chunk], int] = one_a_level
    exact: bool = True
    caches: Callable[[Sequence[Level]], tuple[Hashable, ...]] = no_caches
    check: Callable[[Preset, ReflectiveCache | None], None] = any_run
    note: Callable[[Sequence[int], Collection[int]], str | None] = no_note
