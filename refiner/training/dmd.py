"""Distribution matching distillation: the gradient of KL(q_t || p_t) as a loss.

Two bidirectional networks score noised samples: a frozen real one, with classifier-free guidance,
and a fake one trained online on the generator's samples (AutoRefiner eq. 5; Yin et al. 2024).
Clips are [B, C, F, h, w].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory.whole import WholeClip
from ..rollout import add_noise, predict_x0
from ..wan.causal import CausalWan, KeyValue

Text = list[KeyValue]
SMALLEST = 1e-8  # floor of the gradient's normaliser, for samples that equal their prediction


@dataclass(frozen=True, slots=True)
class DmdOptions:
    """Self-Forcing's scoring: timesteps drawn uniformly, shifted, and clamped to (low, high)."""

    guidance: float = 3.0  # w of real + w · (real − unconditional); the usual scale is 1 + w
    shift: float = 5.0
    low: float = 0.02
    high: float = 0.98


def shifted(u: Tensor, shift: float) -> Tensor:
    """Return σ = s·u / (1 + (s − 1)·u)."""
    return shift * u / (1 + (shift - 1) * u)


def draw_sigma(batch: int, options: DmdOptions, generator: torch.Generator) -> Tensor:
    """Draw one noise level per sample: [B] in (low, high)."""
    u = torch.rand(batch, generator=generator, device=generator.device)
    return shifted(u, options.shift).clamp(options.low, options.high)


def whole_flow(network: CausalWan, noisy: Tensor, sigma: Tensor, text: Text) -> Tensor:
    """Predict the flow of whole clips [B, C, F, h, w] bidirectionally, one level [B] per sample."""
    t = 1000 * sigma[:, None]
    dtype = network.model.patch_embedding.weight.dtype
    return network(noisy.to(dtype), t, text, WholeClip(noisy.shape[2])).to(noisy.dtype)


def column(sigma: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, 1, 1, 1]."""
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
    """Predict x0 of noised clips by the guided real network; `texts`: prompt, empty prompt.

    Guidance 0 takes no pass with the empty one.
    """
    noisy = add_noise(clean, noise, column(sigma))
    prompted, *empty = (
        predict_x0(noisy, whole_flow(real, noisy, sigma, text), column(sigma))
        for text in (texts if guidance else texts[:1])
    )
    return prompted + guidance * (prompted - empty[0]) if empty else prompted


@torch.no_grad()
def dmd_gradient(
    clean: Tensor, noise: Tensor, sigma: Tensor, real: CausalWan, fake: CausalWan,
    texts: tuple[Text, Text, Text], guidance: float,
) -> Tensor:  # fmt: skip
    """Return (fake − real) / mean |clean − real| per sample; the samples should move against it.

    `texts` are the real network's prompt and empty prompt, and the fake network's prompt.
    """
    with_prompt, without, for_fake = texts
    guided = real_prediction(clean, noise, sigma, real, (with_prompt, without), guidance)
    noisy = add_noise(clean, noise, column(sigma))
    predicted = predict_x0(noisy, whole_flow(fake, noisy, sigma, for_fake), column(sigma))
    size = (clean - guided).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return (predicted - guided) / size.clamp_min(SMALLEST)


def dmd_loss(clean: Tensor, gradient: Tensor) -> Tensor:
    """Return ½ mean (x − sg(x − g))², whose gradient in x is `gradient` up to a constant."""
    target = (clean - gradient).detach()
    return 0.5 * F.mse_loss(clean.double(), target.double())


def critic_loss(fake: CausalWan, clean: Tensor, noise: Tensor, sigma: Tensor, text: Text) -> Tensor:
    """Return the fake network's flow-matching loss on samples: mean (v − (ε − x0))²."""
    flow = whole_flow(fake, add_noise(clean, noise, column(sigma)), sigma, text)
    return F.mse_loss(flow, noise - clean)
