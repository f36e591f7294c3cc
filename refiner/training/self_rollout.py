"""Rollout with a graph at one level of every chunk, as Self-Forcing and AutoRefiner train."""

import torch
from torch import Tensor

from ..rollout import Rollout


def self_rollout(rollout: Rollout, exit_level: int, grad_level: int | None = None) -> Tensor:
    """Sample every chunk down to `exit_level` and stop there; returns clips [B, C, F, h, w].

    `exit_level` indexes the last chunk's levels; a first chunk with other levels ends at the same
    nominal one. The graph starts at the noise of `grad_level` (default: the exit level, as in
    AutoRefiner's Algorithm 1) with its refinement and covers every later prediction; history
    (latents, keys and values) and the prediction before are detached. The rollout's memory must be
    a GraphMemory.
    """
    usual = rollout.chunks[-1].levels
    last = usual[exit_level].step
    first_grad = last if grad_level is None else usual[grad_level].step
    predictions = []
    for chunk in rollout:
        x0: Tensor | None = None
        for level in chunk.levels:
            if level.step < last:
                break
            with torch.set_grad_enabled(torch.is_grad_enabled() and level.step <= first_grad):
                x = rollout.draw(chunk, level) if x0 is None else rollout.renoise(x0, level, chunk)
                x0 = rollout.predict(x, level, chunk)
        with torch.no_grad():
            rollout.commit(x0.detach(), chunk)
        predictions.append(x0)
    return torch.cat(predictions, dim=2)
