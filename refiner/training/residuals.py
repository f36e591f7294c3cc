"""What a refiner adds to the noises of a rollout: watched, measured, and penalised."""

import torch
from torch import Tensor

from ..schedule import Level


def normal_distance(noise_BCFhw: Tensor) -> Tensor:
    """How far noise is from N(0, I): KL(N(m, s²) || N(0, 1)) in nats, a Gaussian fitted to each channel, their mean.

    White noise of n values a channel has 1/n. It is in the units of the penalty: a shift of all values by m has m²/2.
    """
    variance, mean = torch.var_mean(noise_BCFhw.float(), dim=(0, 2, 3, 4), correction=0)
    return 0.5 * (variance + mean.square() - 1 - variance.log()).mean()


class Residuals:
    """A refiner's watch over one rollout: the residuals that have a graph, and figures of all of them by level."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []  # [B, C, F, h, w], one a chunk
        self.seen: dict[str, list[Tensor]] = {}

    def __call__(self, noise: Tensor, residual: Tensor, level: Level) -> None:
        if residual.requires_grad:
            self.trained.append(residual)
        with torch.no_grad():
            for name, figure in (("change", residual.abs().mean()), ("distance", normal_distance(noise + residual))):
                self.seen.setdefault(f"{name} {level.step}", []).append(figure)

    def penalty(self, device: torch.device) -> Tensor:
        """½ mean(Δ²) over elements, then over chunks (AutoRefiner eq. 9); 0 where nothing was refined."""
        if not self.trained:
            return torch.zeros((), device=device)
        return torch.stack([0.5 * residual.float().square().mean() for residual in self.trained]).mean()

    def figures(self) -> dict[str, Tensor]:
        """Of each level `change`, the mean |Δ|, and `distance`, that of ε + Δ from N(0, I); means over chunks."""
        return {name: torch.stack(each).mean() for name, each in self.seen.items()}
