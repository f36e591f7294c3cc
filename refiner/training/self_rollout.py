"""The sampler's own rollout with a graph behind one level of every chunk, as Self-Forcing and
AutoRefiner train."""

import torch
from torch import Tensor

from ..rollout import Rollout


def self_rollout(rollout: Rollout, exit_level: int, grad_level: int | None = None) -> Tensor:
    """Sample every chunk down to `exit_level` (an index into the last one's levels) and stop there;
    [B, C, F, h, w].

    A first chunk with levels of its own ends at the same nominal step. The noise of `grad_level`
    (default: the exit level, as AutoRefiner's Algorithm 1 has it), its refinement and every
    prediction from there on have a graph; history is detached, as latents and as keys and values,
    and so is the prediction before. The rollout's memory must be a GraphMemory.
    """
    usual = rollout.chunks[-1].levels
    last, first_grad = (
        usual[exit_level].step,
        usual[exit_level if grad_level is None else grad_level].step,
    )
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
