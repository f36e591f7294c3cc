"""The sampler's own rollout with a graph behind one level of every chunk, as Self-Forcing trains."""

import torch
from torch import Tensor

from ..rollout import Rollout


def self_rollout(rollout: Rollout, exit_level: int) -> Tensor:
    """Sample every chunk down to `exit_level` (an index into its levels) and stop there; [B, C, F, h, w].

    Only the last prediction of each chunk has a graph; history is detached, as latents and as keys and values. The
    rollout's memory must be a GraphMemory.
    """
    made = []
    for chunk in rollout.chunks:
        level, *below = chunk.levels[: exit_level + 1]
        x = rollout.draw(chunk, level)
        with torch.no_grad():
            for following in below:
                x0 = rollout.predict(x, level, chunk)
                x, level = rollout.renoise(x0, following, chunk), following
        x0 = rollout.predict(x, level, chunk)
        with torch.no_grad():
            rollout.commit(x0.detach(), chunk)
        made.append(x0)
    return torch.cat(made, dim=2)
