"""Distribution matching distillation: the gradient of KL(q_t || p_t) as a loss (AutoRefiner eq. 5;
Yin et al. 2024).

Two bidirectional networks score noised samples: a frozen real one, with classifier-free guidance,
and a fake one that is trained online on the generator's own samples. Clips are [B, C, F, h, w].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory.whole import WholeClip
from ..rollout import add_noise, predict_x0
from ..wan.causal import CausalWan, KeyValue

Text = list[KeyValue]
SMALLEST = (
    1e-8  # distance of samples from what the real network makes of them, where they are the same
)


@dataclass(frozen=True, slots=True)
class DmdOptions:
    """As in Self-Forcing's training: timesteps are drawn uniformly, shifted, and kept inside (low,
    high)."""

    guidance: float = (
        3.0  # w of real + w · (real − real without a prompt): the usual scale is 1 + w
    )
    shift: float = 5.0
    low: float = 0.02
    high: float = 0.98


def shifted(u: Tensor, shift: float) -> Tensor:
    """σ = s·u / (1 + (s − 1)·u)."""
    return shift * u / (1 + (shift - 1) * u)


def draw_sigma(batch: int, options: DmdOptions, generator: torch.Generator) -> Tensor:
    """One noise level a sample, [B] in (low, high)."""
    u = torch.rand(batch, generator=generator, device=generator.device)
    return shifted(u, options.shift).clamp(options.low, options.high)


def whole_flow(network: CausalWan, noisy: Tensor, sigma: Tensor, text: Text) -> Tensor:
    """The flow of whole clips [B, C, F, h, w] at one level a sample [B], every frame seeing every
    other."""
    t = 1000 * sigma[:, None]
    dtype = network.model.patch_embedding.weight.dtype
    return network(noisy.to(dtype), t, text, WholeClip(noisy.shape[2])).to(noisy.dtype)


def column(sigma: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1, 1]."""
    return sigma[:, None, None, None, None]


@torch.no_grad()
def real_prediction(
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    real: CausalWan,
    texts: tuple[Text, Text],
    guidance: float,
) -> Tensor:
    """x0 of noised clips by the real network, guided; `texts` are the prompt and no prompt."""
    noisy = add_noise(clean, noise, column(sigma))
    predictions = [
        predict_x0(noisy, whole_flow(real, noisy, sigma, text), column(sigma)) for text in texts
    ]
    return predictions[0] + guidance * (predictions[0] - predictions[1])


@torch.no_grad()
def dmd_gradient(
    clean: Tensor, noise: Tensor, sigma: Tensor, real: CausalWan, fake: CausalWan, texts: tuple[Text, Text, Text],
    guidance: float,
) -> Tensor:  # fmt: skip
    """(fake − real) / mean |clean − real|, per sample: where the samples should not go.

    `texts` are the prompt for the real network, no prompt for it, and the prompt for the fake
    network.
    """
    with_prompt, without, for_fake = texts
    guided = real_prediction(clean, noise, sigma, real, (with_prompt, without), guidance)
    noisy = add_noise(clean, noise, column(sigma))
    predicted = predict_x0(noisy, whole_flow(fake, noisy, sigma, for_fake), column(sigma))
    size = (clean - guided).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return (predicted - guided) / size.clamp_min(SMALLEST)


def dmd_loss(clean: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to `clean` is the given one, up to a constant: ½ mean (x −
    sg(x − g))²."""
    target = (clean - gradient).detach()
    return 0.5 * F.mse_loss(clean.double(), target.double())


def critic_loss(fake: CausalWan, clean: Tensor, noise: Tensor, sigma: Tensor, text: Text) -> Tensor:
    """Flow matching of the fake network on samples: mean (v − (ε − x0))²."""
    flow = whole_flow(fake, add_noise(clean, noise, column(sigma)), sigma, text)
    return F.mse_loss(flow, noise - clean)
