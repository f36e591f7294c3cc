"""The deterministic control of AutoRefiner's Fig. 3: Euler steps along the flow instead of fresh noise (eq. 19)."""

from collections.abc import Iterator

from torch import Tensor

from ..rollout import Rollout, add_noise


def ode(rollout: Rollout) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] of each chunk; only the noise that it starts from is random.

    An Euler step x + (σ' − σ) v is renoising with the noise that the prediction implies, ε = (x − (1 − σ) x0) / σ.
    """
    for chunk in rollout.chunks:
        level, *rest = chunk.levels
        x = rollout.draw(chunk, level)
        x0 = rollout.predict(x, level, chunk)
        for below in rest:
            implied = (x - (1 - level.sigma) * x0) / level.sigma
            x, level = add_noise(x0, implied, below.sigma), below
            x0 = rollout.predict(x, level, chunk)
        rollout.commit(x0, chunk)
        yield x0
