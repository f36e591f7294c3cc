"""The record of a sampling method: its generator, and what progress bars and estimates ask."""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..memory.reflect import ReflectiveCache
from ..rollout import Rollout
from ..schedule import Chunk, Level, Preset
from ..timeline import Timeline


def one_a_level(chunk: Chunk) -> int:
    """Count one prediction for each level."""
    return len(chunk.levels)


def no_caches(levels: Sequence[Level]) -> tuple[Hashable, ...]:
    """Return no names: the main memory is enough."""
    return ()


def any_run(preset: Preset, cache: ReflectiveCache | None) -> None:
    """Accept every preset and refiner."""


def any_timeline(timeline: Timeline) -> None:
    """Accept every timeline."""


def one_chunk(levels: Sequence[Level]) -> int:
    """Return 1: a pass is over one chunk."""
    return 1


def no_note(levels: Sequence[int], refined: Collection[int]) -> str | None:
    """Return None: the method always has something to do."""
    return None


@dataclass(frozen=True, slots=True)
class Method:
    """A sampling method with its knobs set, made by a function of `SAMPLERS` or `SEARCHES`.

    `run` yields the x0 [B, C, F, h, w] of each chunk. `passes` counts the predictions of a chunk,
    at most; without `exact` there may be fewer. `caches` names memories besides the main one.
    `check` raises ValueError for a preset or a refiner's cache that the method cannot run with,
    `check_timeline` for a timeline that it cannot follow. `together` is the most chunks that a pass
    predicts. A method that `goes_on` makes the same clip in one run or in several; one that begins
    later chunks before a chunk is finished does not. `note` returns a warning if the method, or a
    refiner, does nothing at these nominal levels, of which some are refined.
    """

    name: str
    run: Callable[[Rollout], Iterator[Tensor]]
    passes: Callable[[Chunk], int] = one_a_level
    exact: bool = True
    caches: Callable[[Sequence[Level]], tuple[Hashable, ...]] = no_caches
    check: Callable[[Preset, ReflectiveCache | None], None] = any_run
    check_timeline: Callable[[Timeline], None] = any_timeline
    together: Callable[[Sequence[Level]], int] = one_chunk
    goes_on: bool = True
    note: Callable[[Sequence[int], Collection[int]], str | None] = no_note
