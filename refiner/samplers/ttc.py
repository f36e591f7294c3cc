"""Pathwise Test-Time Correction: pull late levels back to the first frames of the video.

At a corrected level of chunk i > 0: predict, renoise, predict with the first frames as the only
history, renoise, predict with the usual history. Two more passes a correction, and one to write the
first frames to a memory of their own. Nothing is learnt.
"""

from collections.abc import Collection, Hashable, Iterator, Sequence

from torch import Tensor

from ..memory.plan import FirstFrames
from ..rollout import Rollout
from ..schedule import Chunk, Level
from ..timeline import Timeline
from .method import Method


def ttc(below: int = 600, count: int = 1, anchor: int = 1) -> Method:
    """Correct the levels whose nominal step is less than `below`, each `count` times.

    `anchor` is the number of first latent frames that a correction sees. A chunk's first level is
    never corrected, and without a corrected level this is Self-Forcing.
    """
    if count < 0 or anchor < 1:
        raise ValueError(f"count {count}, anchor {anchor}: give at least 0 and at least 1")
    first_frames = FirstFrames(anchor)

    def corrections(level: Level, chunk: Chunk) -> int:
        return count if chunk.index and level != chunk.levels[0] and level.step < below else 0

    def run(rollout: Rollout) -> Iterator[Tensor]:
        anchored = first_frames in rollout.caches
        if anchored and rollout.given:
            rollout.cache(first_frames).flush(0)
        for chunk in rollout:
            first, *rest = chunk.levels
            x0 = rollout.predict(rollout.begin(chunk), first, chunk)
            for level in rest:
                x0 = rollout.predict(rollout.renoise(x0, level, chunk), level, chunk)
                x0 = corrected(rollout, x0, level, chunk, corrections(level, chunk), first_frames)
            rollout.commit(x0, chunk)
            if anchored and chunk.start < anchor:
                rollout.commit(x0, chunk, cache=first_frames)
                rollout.cache(first_frames).flush(0)
            yield x0

    def passes(chunk: Chunk) -> int:
        return sum(1 + 2 * corrections(level, chunk) for level in chunk.levels)

    def caches(levels: Sequence[Level]) -> tuple[Hashable, ...]:
        return (first_frames,) if count and any(each.step < below for each in levels[1:]) else ()

    def note(levels: Sequence[int], refined: Collection[int]) -> str | None:
        if count and any(step < below for step in levels[1:]):
            return None
        return f"ttc corrects levels below {below}, of which this run has none: it changes nothing"

    return Method("ttc", run, passes, caches=caches, note=note, check_timeline=check_timeline)


def check_timeline(timeline: Timeline) -> None:
    """Raise ValueError for a cut, which leaves the first frames behind."""
    if timeline.cuts:
        raise ValueError(
            "ttc pulls every chunk back to the first frames, which a cut leaves: use another"
            " transition, or another method"
        )


def corrected(
    rollout: Rollout, x0: Tensor, level: Level, chunk: Chunk, count: int, anchor: Hashable
) -> Tensor:
    """Return x0 after `count` corrections at a level."""
    for number in range(count):
        x = rollout.renoise(x0, level, chunk, 2 * number + 1)
        x0 = rollout.predict(x, level, chunk, cache=anchor)
        x = rollout.renoise(x0, level, chunk, 2 * number + 2, cache=anchor)
        x0 = rollout.predict(x, level, chunk)
    return x0
