"""Predict and perturb (P&P, Self-Refining Video Sampling): repeat a level with fresh noise where it is unsure.

It learns nothing: AutoRefiner's loop with "draw again" in the place of the refiner, and so its natural control. On
top of a refiner every repeated noise is refined, too.

Whether a further repeat is needed is read from the device, the one place in the samplers where the host waits for it:
a pass over a chunk that is saved costs far more than the wait, and one that would change nothing still would overwrite
the pending keys that a refiner reads. Behind the last repeat nothing is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..rollout import Rollout
from ..schedule import Chunk, Level


@dataclass(frozen=True, slots=True)
class SelfRefine:
    """Repeats by nominal level, and the uncertainty below which a place keeps its first answer.

    The first level is pure noise, where there is nothing to repeat. With four levels, repeat the second and third.
    """

    repeats: dict[int, int] = field(default_factory=lambda: {750: 2, 500: 1})
    threshold: float = 0.25  # mean |change| over channels, in units of the latents
    enough: float = 0.999  # share of certain places at which repeating stops

    def __post_init__(self) -> None:
        if any(count < 0 for count in self.repeats.values()) or self.threshold < 0 or not 0 < self.enough <= 1:
            raise ValueError(
                f"repeats {self.repeats}, threshold {self.threshold}, enough {self.enough}: give counts and a threshold"
                " of 0 or more, and a share within (0, 1]"
            )

    @property
    def levels(self) -> frozenset[int]:
        """Nominal steps that are repeated, where a run has them."""
        return frozenset(step for step, count in self.repeats.items() if count)

    def __call__(self, rollout: Rollout) -> Iterator[Tensor]:
        """Yield the x0 [B, C, F, h, w] of each chunk."""
        for chunk in rollout.chunks:
            first, *rest = chunk.levels
            x0 = rollout.predict(rollout.draw(chunk, first), first, chunk)
            for level in rest:
                x0 = rollout.predict(rollout.renoise(x0, level, chunk), level, chunk)
                x0 = self._repeated(rollout, x0, level, chunk)
            rollout.commit(x0, chunk)
            yield x0

    def _repeated(self, rollout: Rollout, x0: Tensor, level: Level, chunk: Chunk) -> Tensor:
        """x0 after the level's repeats: a place that was certain once stays as it is, and so does a whole sample.

        A sample stops by its own share and keeps the pending keys that a refiner reads of it, so what it becomes does
        not depend on the others in the batch.
        """
        certain, kept = torch.zeros_like(x0[:, :1], dtype=torch.bool), None
        repeats = self.repeats.get(level.step, 0)
        for repeat in range(1, repeats + 1):
            again = rollout.predict(rollout.renoise(x0, level, chunk, repeat), level, chunk, kept)
            certain = certain | ((again - x0).abs().mean(dim=1, keepdim=True) < self.threshold)
            x0 = torch.where(certain, x0, again)
            if repeat < repeats:
                done = certain.float().mean(dim=(1, 2, 3, 4), keepdim=True) > self.enough
                finished = int(done.sum())
                if finished == len(done):
                    break
                certain = certain | done
                kept = done.flatten() if finished and rollout.reads_pending else None
        return x0
