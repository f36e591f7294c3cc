"""Measure and penalise the residuals that a refiner adds to the noises of a rollout."""

import torch
from torch import Tensor

from ..schedule import Level


def normal_distance(noise_BCFhw: Tensor) -> Tensor:
    """Measure how far noise is from N(0, I): mean over channels of KL(N(m, s²) || N(0, 1)), nats.

    White noise of n values per channel has 1/n. The units are those of the penalty: shifting all
    values by m gives m²/2.
    """
    variance, mean = torch.var_mean(noise_BCFhw.float(), dim=(0, 2, 3, 4), correction=0)
    return 0.5 * (variance + mean.square() - 1 - variance.log()).mean()


def describe(noise_BCFhw: Tensor, residual_BCFhw: Tensor) -> dict[str, Tensor]:
    """Return figures of a residual Δ on noise ε.

    `rms` of Δ; `constant`, the rms over channels of each channel's mean Δ, which is the same for
    every clip; `shrink`, the mean of Δ · ε, -c if the noise is shrunk by c; `distance`, that of
    ε + Δ from N(0, I).
    """
    noise, residual = noise_BCFhw.float(), residual_BCFhw.float()
    return {
        "rms": residual.square().mean().sqrt(),
        "constant": residual.mean(dim=(0, 2, 3, 4)).square().mean().sqrt(),
        "shrink": (residual * noise).mean(),
        "distance": normal_distance(noise + residual),
    }


class Residuals:
    """Collects a rollout's residuals: those with a graph, and figures of all by level."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []  # [B, C, F, h, w] per chunk
        self.seen: dict[str, list[Tensor]] = {}

    def __call__(self, noise: Tensor, residual: Tensor, level: Level) -> None:
        if residual.requires_grad:
            self.trained.append(residual)
        with torch.no_grad():
            for name, figure in describe(noise, residual).items():
                self.seen.setdefault(f"{name} {level.step}", []).append(figure)

    def penalty(self, device: torch.device) -> Tensor:
        """Return ½ mean(Δ²) over elements, then chunks (AutoRefiner eq. 9); 0 without residuals."""
        if not self.trained:
            return torch.zeros((), device=device)
        penalties = [0.5 * residual.float().square().mean() for residual in self.trained]
        return torch.stack(penalties).mean()

    def figures(self) -> dict[str, Tensor]:
        """Return each level's figures (see `describe`), averaged over chunks, as `rms 750`."""
        return {name: torch.stack(each).mean() for name, each in self.seen.items()}
