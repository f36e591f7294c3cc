"""How passes are computed in training: products in bf16, attention by what is fastest on the
device."""

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..wan.causal import CausalWan, Halves, Kernels, after_attention, attention, before_attention

Precision = Literal["bf16", "fp32"]
# All but cuDNN's, torch's first choice on an H100 or H200, whose backward pass is known to give NaN
# at times (pytorch issue 196678 and others). A refiner's gradient was NaN on an H200, never on a
# CPU; that this was why is not certain.
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KINDS_OF_CALL = (
    64  # lengths of a history, with and without gradients, that a compiled function may meet
)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products are worth having: on a CPU without instructions for them they are
    emulated, number by number, at a hundredth of fp32's speed and less. Most desktop CPUs have
    none."""
    return device.type != "cpu" or _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    """As oneDNN says, by a function of torch's own that a version may lack: fp32 is right then,
    too."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


def allow_recompiling(times: int) -> None:
    """Let a compiled function be compiled for so many kinds of call; the setting's name changed in
    torch 2.6."""
    config = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, times)
            return


def mixed_precision(device: torch.device, precision: Precision = "bf16") -> torch.autocast:
    """bf16 for the products, fp32 for the rest: as good here, and two to three times as fast, on a
    CPU that has them.

    With fp32, and on a CPU that has no bf16 products, nothing is cast. No cast is kept for the next
    pass: in older versions of torch a weight that was first cast without gradients, as in the
    levels before the trained one, would get none behind it either.
    """
    wanted = precision == "bf16" and multiplies_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)


def explicit_attention(
    q_BNHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, bias: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ / √D) v [B, N, H·D] by two products: in bf16 on the CPU four times as fast as
    the fused kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BTHD, v_BTHD))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def fused_attention(q_BNHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v [B, N, H·D] by torch's choice of kernels other than cuDNN's."""
    with sdpa_kernel(WITHOUT_CUDNN):
        return attention(q_BNHD, k_BTHD, v_BTHD, *bias)


def for_training(network: CausalWan, device: torch.device, compiled: bool = False) -> CausalWan:
    """The network with attention as training computes it: products on the CPU, else the fused
    kernel.

    With `compiled`, and a C++ compiler on the machine, a step takes about three quarters of its
    time, and replayed on a GPU little more than half; the first ones of a process take half a
    minute.
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
