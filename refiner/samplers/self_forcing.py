"""Self-Forcing's stochastic few-step sampler (AutoRefiner eqs. 2-4): predict, renoise with fresh noise, repeat."""

from collections.abc import Iterator

from torch import Tensor

from ..rollout import Rollout


def self_forcing(rollout: Rollout) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] of each chunk as soon as it is part of the history."""
    for chunk in rollout.chunks:
        first, *rest = chunk.levels
        x0 = rollout.predict(rollout.draw(chunk, first), first, chunk)
        for level in rest:
            x0 = rollout.predict(rollout.renoise(x0, level, chunk), level, chunk)
        rollout.commit(x0, chunk)
        yield x0
