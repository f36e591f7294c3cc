"""Self-Forcing's stochastic few-step sampler (AutoRefiner, eqs. 2-4)."""

from collections.abc import Iterator

from torch import Tensor

from ..rollout import Rollout
from ..schedule import Chunk
from .method import Method


def self_forcing() -> Method:
    """Predict, renoise with fresh noise and repeat down the levels, then commit the chunk."""
    return Method("self-forcing", run)


def run(rollout: Rollout) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] of each chunk as soon as it is committed."""
    for chunk in rollout:
        x0 = predict_chunk(rollout, chunk)
        rollout.commit(x0, chunk)
        yield x0


def predict_chunk(rollout: Rollout, chunk: Chunk) -> Tensor:
    """Return the x0 of a chunk after all its levels."""
    first, *rest = chunk.levels
    x0 = rollout.predict(rollout.begin(chunk), first, chunk)
    for level in rest:
        x0 = rollout.predict(rollout.renoise(x0, level, chunk), level, chunk)
    return x0
