"""HiAR: each level of a chunk attends to a history of its own, one level cleaner.

Chunk i at level j attends to every earlier chunk as it is at level j + 1, so errors of clean
predictions do not accumulate. A pass and a commit for each level and chunk. The order is pipelined:
a wave takes each of the chunks that are begun one level down, so chunk 0 is finished after as many
waves as there are levels, and no more chunks than levels are held. Level by level over all chunks
gives the same latents, bit for bit.
"""

from collections.abc import Hashable, Iterator, Sequence
from functools import partial

from torch import Tensor

from ..memory.reflect import ReflectiveCache
from ..rollout import Rollout
from ..schedule import Level, Preset
from .method import Method
from .waves import check_levels, check_one_prompt, waves


def hiar() -> Method:
    """Denoise chunks in a pipeline, a memory a level. With one level it is Self-Forcing."""
    one_prompt = partial(check_one_prompt, "hiar")
    return Method("hiar", run, caches=caches, check=check, check_timeline=one_prompt, goes_on=False)


def caches(levels: Sequence[Level]) -> tuple[Hashable, ...]:
    """Name a memory for each level but the last, whose history is clean."""
    return tuple(level.step for level in levels[:-1])


def check(preset: Preset, cache: ReflectiveCache | None) -> None:
    """Raise ValueError for a preset whose first chunk has other levels."""
    check_levels("hiar", preset)


def run(rollout: Rollout) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] of each chunk."""
    latents: dict[int, Tensor] = {}  # of the chunks in the pipeline, by index
    for wave in waves(rollout):
        for chunk, level, below in reversed(wave):  # they do not depend on each other
            cache = level.step if below else None
            x = latents.pop(chunk.index, None)
            x = rollout.begin(chunk) if x is None else x
            x0 = rollout.predict(x, level, chunk, cache=cache)
            if below is None:
                rollout.commit(x0, chunk)
                yield x0
            else:
                latents[chunk.index] = rollout.renoise(x0, below, chunk, cache=cache)
                rollout.commit(latents[chunk.index], chunk, below.t, cache)
