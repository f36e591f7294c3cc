"""HiAR: denoise all chunks level by level, each level with its own, one level cleaner history.

Chunk i at level j attends to every earlier chunk as it is at level j + 1, so errors of clean
predictions do not accumulate. A pass and a commit for each level and chunk; the latents of all
chunks are held until the last level.
"""

from collections.abc import Hashable, Iterator, Sequence

from torch import Tensor

from ..memory.reflect import ReflectiveCache
from ..rollout import Rollout
from ..schedule import Level, Preset
from .method import Method


def hiar() -> Method:
    """Denoise all chunks level by level. With one level it is Self-Forcing."""
    return Method("hiar", run, caches=caches, check=check)


def caches(levels: Sequence[Level]) -> tuple[Hashable, ...]:
    """Name a memory for each level but the last, whose history is clean."""
    return tuple(level.step for level in levels[:-1])


def check(preset: Preset, cache: ReflectiveCache | None) -> None:
    """Raise ValueError for a preset whose first chunk has other levels."""
    if preset.first_levels and preset.first_levels != preset.levels:
        raise ValueError(
            "hiar needs the same levels in every chunk, and this preset's first chunk has others:"
            " use another method or preset"
        )


def run(rollout: Rollout) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] of each chunk; all of them follow at the last level."""
    if rollout.timeline is not None and len(rollout.timeline.scenes) > 1:
        raise ValueError(
            "hiar goes through all chunks at once and cannot change its prompt: use another method"
        )
    chunks = list(rollout)
    levels = chunks[-1].levels
    latents = [rollout.draw(chunk, levels[0]) for chunk in chunks]
    for index, level in enumerate(levels):
        below = levels[index + 1] if index + 1 < len(levels) else None
        cache = level.step if below else None
        for number, chunk in enumerate(chunks):
            x0 = rollout.predict(latents[number], level, chunk, cache=cache)
            if below is None:
                rollout.commit(x0, chunk)
                yield x0
            else:
                latents[number] = rollout.renoise(x0, below, chunk, cache=cache)
                rollout.commit(latents[number], chunk, below.t, cache)
