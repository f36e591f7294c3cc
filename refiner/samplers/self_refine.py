"""Predict and perturb (Self-Refining Video Sampling): repeat uncertain levels with fresh noise.

Nothing is learnt: AutoRefiner's loop with another draw in place of the refiner, and so its natural
control. With a refiner, every repeated noise is refined, too.

Whether another repeat is needed is read from the device, the one place in the samplers where the
host waits for it: the wait costs far less than a pass over a chunk, and a pass that changes nothing
would still overwrite the pending keys that a refiner reads. After the last repeat nothing is read.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ..rollout import Rollout
from ..schedule import Chunk, Level
from .method import Method

REPEATS = MappingProxyType({750: 2, 500: 1})
Repeat = Callable[[Rollout, Tensor, Level, Chunk], Tensor]


def self_refine(
    repeats: Mapping[int, int] = REPEATS, threshold: float = 0.25, enough: float = 0.999
) -> Method:
    """Repeat levels, by nominal step; the first level is pure noise and cannot be repeated.

    A position is certain once its prediction changes by less than `threshold` (mean |change| over
    channels, in units of the latents), and stays as it is. Repeating stops once more than the share
    `enough` of a sample is certain.
    """
    if any(count < 0 for count in repeats.values()) or threshold < 0 or not 0 < enough <= 1:
        raise ValueError(
            f"repeats {dict(repeats)}, threshold {threshold}, enough {enough}: give counts and a"
            " threshold of 0 or more, and a share within (0, 1]"
        )

    def repeat(rollout: Rollout, x0: Tensor, level: Level, chunk: Chunk) -> Tensor:
        return repeated(rollout, x0, level, chunk, repeats.get(level.step, 0), threshold, enough)

    def passes(chunk: Chunk) -> int:
        return sum(1 + repeats.get(level.step, 0) for level in chunk.levels)

    def note(levels: Sequence[int], refined: Collection[int]) -> str | None:
        repeated_levels = sorted((step for step, count in repeats.items() if count), reverse=True)
        if {*repeated_levels} & {*levels}:
            return None
        listed = ",".join(map(str, repeated_levels)) or "none"
        return (
            f"self-refine repeats levels {listed}, of which this run has none: it changes nothing"
        )

    return Method(
        "self-refine", lambda rollout: run(rollout, repeat), passes, exact=False, note=note
    )


def run(rollout: Rollout, repeat: Repeat) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] of each chunk."""
    for chunk in rollout:
        first, *rest = chunk.levels
        x0 = rollout.predict(rollout.begin(chunk), first, chunk)
        for level in rest:
            x0 = rollout.predict(rollout.renoise(x0, level, chunk), level, chunk)
            x0 = repeat(rollout, x0, level, chunk)
        rollout.commit(x0, chunk)
        yield x0


def repeated(
    rollout: Rollout,
    x0: Tensor,
    level: Level,
    chunk: Chunk,
    repeats: int,
    threshold: float,
    enough: float,
) -> Tensor:
    """Return x0 after a level's repeats; certain positions and finished samples stay as they are.

    A sample finishes by its own share of certain positions and then keeps its pending keys, which a
    refiner reads, so it does not depend on the other samples of the batch.
    """
    certain, finished = torch.zeros_like(x0[:, :1], dtype=torch.bool), None
    for count in range(1, repeats + 1):
        again = rollout.predict(rollout.renoise(x0, level, chunk, count), level, chunk, finished)
        certain = certain | ((again - x0).abs().mean(dim=1, keepdim=True) < threshold)
        x0 = torch.where(certain, x0, again)
        if count < repeats:
            done = certain.float().mean(dim=(1, 2, 3, 4), keepdim=True) > enough
            number = int(done.sum())
            if number == len(done):
                break
            certain = certain | done
            finished = done.flatten() if number and rollout.reads_pending else None
    return x0
