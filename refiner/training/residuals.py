"""What a refiner adds to the noises of a rollout: watched, measured, and penalised."""

import torch
from torch import Tensor

from ..schedule import Level


def normal_distance(noise_BCFhw: Tensor) -> Tensor:
    """How far noise is from N(0, I): KL(N(m, s²) || N(0, 1)) in nats, a Gaussian fitted to each
    channel, their mean.

    White noise of n values a channel has 1/n. It is in the units of the penalty: a shift of all
    values by m has m²/2.
    """
    variance, mean = torch.var_mean(noise_BCFhw.float(), dim=(0, 2, 3, 4), correction=0)
    return 0.5 * (variance + mean.square() - 1 - variance.log()).mean()


def describe(noise_BCFhw: Tensor, residual_BCFhw: Tensor) -> dict[str, Tensor]:
    """Figures of a residual Δ on noise ε.

    `rms` of Δ; `constant`, the rms over channels of each channel's mean Δ, which says nothing about
    a clip; `shrink`, the mean of Δ · ε, which is -c where the noise was shrunk by c; `distance`,
    that of ε + Δ from N(0, I).
    """
    noise, residual = noise_BCFhw.float(), residual_BCFhw.float()
    return {
        "rms": residual.square().mean().sqrt(),
        "constant": residual.mean(dim=(0, 2, 3, 4)).square().mean().sqrt(),
        "shrink": (residual * noise).mean(),
        "distance": normal_distance(noise + residual),
    }


class Residuals:
    """A refiner's watch over one rollout: the residuals that have a graph, and figures of all of
    them by level."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []  # [B, C, F, h, w], one a chunk
        self.seen: dict[str, list[Tensor]] = {}

    def __call__(self, noise: Tensor, residual: Tensor, level: Level) -> None:
        if residual.requires_grad:
            self.trained.append(residual)
        with torch.no_grad():
            for name, figure in describe(noise, residual).items():
                self.seen.setdefault(f"{name} {level.step}", []).append(figure)

    def penalty(self, device: torch.device) -> Tensor:
        """½ mean(Δ²) over elements, then over chunks (AutoRefiner eq. 9); 0 where nothing was
        refined."""
        if not self.trained:
            return torch.zeros((), device=device)
        return torch.stack(
            [0.5 * residual.float().square().mean() for residual in self.trained]
        ).mean()

    def figures(self) -> dict[str, Tensor]:
        """Figures of every level (see `describe`), as means over chunks, by names like `rms
        750`."""
        return {name: torch.stack(each).mean() for name, each in self.seen.items()}
