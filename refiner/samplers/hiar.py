"""HiAR: levels outside, chunks inside. Each level has a history of its own, one level cleaner than
what it predicts.

Chunk i at level j sees every earlier chunk as it is at level j + 1, so errors of clean predictions
do not pile up. A pass and a commit for each level and chunk; the latents of all chunks are held
until the last level.
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
    """A memory for each level but the last, whose history is clean."""
    return tuple(level.step for level in levels[:-1])


def check(preset: Preset, cache: ReflectiveCache | None) -> None:
    """Raise ValueError where the first chunk has levels of its own."""
    if preset.first_levels and preset.first_levels != preset.levels:
        raise ValueError(
            "hiar goes through the same levels in every chunk, this preset's first chunk has its own"
        )


def run(rollout: Rollout) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] of each chunk, all of them at the last level."""
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
        for place, chunk in enumerate(chunks):
            x0 = rollout.predict(latents[place], level, chunk, cache=cache)
            if below is None:
                rollout.commit(x0, chunk)
                yield x0
            else:
                latents[place] = rollout.renoise(x0, below, chunk, cache=cache)
                rollout.commit(latents[place], chunk, below.t, cache)
