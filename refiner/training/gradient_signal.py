"""Measure the signal in a gradient: what the gradients of independent batches have in common."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from .distributed import whole

ENOUGH = 64  # updates after which a training's gradients are judged
SURE = 2.0  # standard errors above 0 that count as a signal
ADVICE = "pool more clips (accumulation), or train for another objective"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of the gradients of independent batches at the same parameters."""

    cosine: float  # mean over pairs
    error: float  # standard error of that mean
    share: float  # power of the common gradient, relative to that of one batch's

    @property
    def seen(self) -> bool:
        """Whether there is a significant signal."""
        return self.cosine > SURE * self.error


def agreement(gradients_KN: Tensor) -> Agreement:
    """Compare K ≥ 3 flat gradients.

    Pairs share gradients, so the standard error is a jackknife's over gradients. The share is
    unbiased: with m their mean, p = mean |g|² and s = |m|² - (p - |m|²) / (K - 1), it is s / p.
    """
    gradients = gradients_KN.double()
    count = len(gradients)
    unit = gradients / gradients.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(0)
    pairs = count * (count - 1)
    mean = cosines.sum() / pairs
    without = (cosines.sum() - 2 * cosines.sum(dim=1)) / (pairs - 2 * (count - 1))
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    power, common = gradients.square().sum(dim=1).mean(), gradients.mean(dim=0).square().sum()
    share = (common - (power - common) / (count - 1)) / power.clamp_min(1e-30)
    return Agreement(mean.item(), error.item(), share.item())


def flat(gradients: Iterable[Tensor | None]) -> Tensor:
    """Concatenate gradients to one vector, without parameters that have none."""
    return torch.cat([whole(gradient).flatten() for gradient in gradients if gradient is not None])


class Signal:
    """Track the cosine between successive updates' gradients, whose clips are independent.

    Warns once if its first updates have nothing in common.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.cosines: list[float] = []

    def compare(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Return `signal`, the cosine with the previous update; nothing at the first one."""
        gradient, before = flat(gradients), self.last
        self.last = gradient
        if before is None or before.shape != gradient.shape:
            return {}
        cosine = torch.nn.functional.cosine_similarity(before, gradient, dim=0)
        self._judge(cosine.item())
        return {"signal": cosine}

    def _judge(self, cosine: float) -> None:
        self.cosines.append(cosine)
        if len(self.cosines) != ENOUGH:
            return
        mean, error = fmean(self.cosines), stdev(self.cosines) / math.sqrt(ENOUGH)
        if mean <= SURE * error:
            warnings.warn(
                f"no signal: the gradients of {ENOUGH} updates have a mean cosine of"
                f" {mean:+.3f} ± {error:.3f}, so the training wanders: {ADVICE}",
                stacklevel=2,
            )
