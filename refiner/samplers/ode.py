"""Deterministic sampling by Euler steps along the flow (AutoRefiner, Fig. 3 and eq. 19)."""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from ..rollout import Rollout, add_noise
from .method import Method

# unless the initial noise is refined
IDLE = "ode draws no noise between levels, so the refiner has nothing to refine"


def ode() -> Method:
    """Integrate the flow; only the initial noise of a chunk is random."""
    return Method("ode", run, note=note)


def note(levels: Sequence[int], refined: Collection[int]) -> str | None:
    """Return a line if a refiner would refine nothing."""
    return IDLE if refined and levels[0] not in refined else None


def run(rollout: Rollout) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] of each chunk.

    An Euler step x + (σ' − σ) v renoises with the implied noise ε = (x − (1 − σ) x0) / σ.
    """
    for chunk in rollout:
        level, *rest = chunk.levels
        x = rollout.begin(chunk)
        x0 = rollout.predict(x, level, chunk)
        for below in rest:
            implied = (x - (1 - level.sigma) * x0) / level.sigma
            x, level = add_noise(x0, implied, below.sigma), below
            x0 = rollout.predict(x, level, chunk)
        rollout.commit(x0, chunk)
        yield x0
