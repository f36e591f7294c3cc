"""Numerics of training: products in bf16, attention by the device's fastest kernel."""

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..wan.causal import CausalWan, Halves, Kernels, after_attention, attention, before_attention
from ..wan.compiled import KINDS_OF_CALL, allow_recompiling

Precision = Literal["bf16", "fp32"]
# Without cuDNN, torch's first choice on an H100 or H200: its backward pass is known to return NaN
# at times (pytorch issue 196678 and others). A refiner's gradient was NaN on an H200 and never on a
# CPU; whether this was the cause is not certain.
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the device has fast bf16 products.

    CPUs without the instructions, as most desktop CPUs, emulate them at less than a hundredth of
    fp32's speed.
    """
    return device.type != "cpu" or _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    """Ask oneDNN through a private function of torch; False where a version lacks it."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


def mixed_precision(device: torch.device, precision: Precision = "bf16") -> torch.autocast:
    """Autocast products to bf16: as good here, and two to three times as fast.

    Does nothing for fp32 or on a device without fast bf16 products. Casts are not cached: older
    versions of torch would reuse a weight's cast from a pass without gradients, as at the levels
    before the trained one, and the weight would get no gradient.
    """
    wanted = precision == "bf16" and multiplies_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)


def explicit_attention(
    q_BNHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return softmax(q kᵀ / √D) v [B, N, H·D] by two products.

    In bf16 on a CPU four times as fast as the fused kernel.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BTHD, v_BTHD))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def fused_attention(q_BNHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *bias: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √D) v [B, N, H·D] by a fused kernel other than cuDNN's."""
    with sdpa_kernel(WITHOUT_CUDNN):
        return attention(q_BNHD, k_BTHD, v_BTHD, *bias)


def for_training(network: CausalWan, device: torch.device, compiled: bool = False) -> CausalWan:
    """Return the network with training's attention: explicit products on a CPU, else fused.

    With `compiled` (needs a C++ compiler) a step takes about three quarters of the time, replayed
    on a GPU little more than half; a process's first steps take half a minute.
    """
    kernels, halves = _training_functions(device, compiled)
    return replace(network, kernels=kernels, halves=halves)


@lru_cache(maxsize=8)
def _training_functions(device: torch.device, compiled: bool) -> tuple[Kernels, Halves]:
    attend = explicit_attention if device.type == "cpu" else fused_attention
    if not compiled:
        return Kernels(attend), Halves()
    allow_recompiling(KINDS_OF_CALL)
    functions = (attend, before_attention, after_attention)
    attend, before, after = (torch.compile(function, dynamic=False) for function in functions)
    return Kernels(attend), Halves(before, after)
