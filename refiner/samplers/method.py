"""What a sampling method is: a generator over a rollout, and what others need to know of it."""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..memory.reflect import ReflectiveCache
from ..rollout import Rollout
from ..schedule import Chunk, Level, Preset


def one_a_level(chunk: Chunk) -> int:
    """One prediction for each level."""
    return len(chunk.levels)


def no_caches(levels: Sequence[Level]) -> tuple[Hashable, ...]:
    """No memory but the one that there always is."""
    return ()


def any_run(preset: Preset, cache: ReflectiveCache | None) -> None:
    """Accept every preset and refiner."""


def no_note(levels: Sequence[int], refined: Collection[int]) -> str | None:
    """Nothing to say."""
    return None


@dataclass(frozen=True, slots=True)
class Method:
    """A sampling method with its knobs set; made by the functions in `METHODS`.

    `run` yields the x0 [B, C, F, h, w] of each chunk. `passes` is the number of predictions of a
    chunk, at most; without `exact` there may be fewer. `caches` names memories besides the one that
    there always is. `check` raises ValueError for a preset or a refiner's cache that the method
    cannot run with. `note` is a line where the method, or a refiner, has nothing to do in a run of
    these nominal levels, of which some are refined.
    """

    name: str
    run: Callable[[Rollout], Iterator[Tensor]]
    passes: Callable[[Chunk], int] = one_a_level
    exact: bool = True
    caches: Callable[[Sequence[Level]], tuple[Hashable, ...]] = no_caches
    check: Callable[[Preset, ReflectiveCache | None], None] = any_run
    note: Callable[[Sequence[int], Collection[int]], str | None] = no_note
