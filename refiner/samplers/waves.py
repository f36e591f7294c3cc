"""The order of methods that hold several chunks at once: chunk i is at level j in wave i + j."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..schedule import Chunk, Level, Preset
from ..timeline import Timeline


class Place(NamedTuple):
    """A chunk at one of its levels."""

    chunk: Chunk
    level: Level
    below: Level | None  # the next level; None at the last


def waves(chunks: Iterable[Chunk]) -> Iterator[list[Place]]:
    """Yield the places of each wave, oldest chunk first.

    All chunks have the same T levels; N chunks take N + T - 1 waves. A chunk is taken from `chunks`
    at the wave that it enters, so their end may be unknown.
    """
    window: deque[Chunk] = deque()
    depths: deque[int] = deque()  # index of the level that each chunk of the window is at
    source = iter(chunks)
    while True:
        entering = next(source, None)
        if entering is not None:
            window.append(entering)
            depths.append(0)
        if not window:
            return
        yield [place_of(*each) for each in zip(window, depths, strict=True)]
        depths = deque(depth + 1 for depth in depths)
        if depths[0] == len(window[0].levels):
            window.popleft()
            depths.popleft()


def place_of(chunk: Chunk, depth: int) -> Place:
    """Return the place of a chunk at one of its levels, by index."""
    levels = chunk.levels
    return Place(chunk, levels[depth], levels[depth + 1] if depth + 1 < len(levels) else None)


def check_levels(name: str, preset: Preset) -> None:
    """Raise ValueError for a preset whose first chunk has other levels."""
    if preset.first_levels and preset.first_levels != preset.levels:
        raise ValueError(
            f"{name} needs the same levels in every chunk, and this preset's first chunk has"
            " others: use another method or preset"
        )


def check_one_prompt(name: str, timeline: Timeline) -> None:
    """Raise ValueError for a timeline in which the prompt changes."""
    if len(timeline.scenes) > 1:
        raise ValueError(
            f"{name} goes through several chunks at once and cannot change its prompt: use another"
            " method, or one prompt"
        )
