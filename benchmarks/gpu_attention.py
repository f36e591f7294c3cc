"""The section of `gpu.py` on attention: which of torch's kernels is the fastest for a pass."""

import statistics
from contextlib import nullcontext

import torch
from gpu_sections import ROUNDS, SETTINGS, Kit, Setting
from torch.nn.attention import SDPBackend, sdpa_kernel

from autorefiner.refiner.bench import clock
from autorefiner.refiner.wan.causal import attention as attend
from autorefiner.refiner.wan.transformer import PATCH

KERNELS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@torch.no_grad()
def attention(kit: Kit) -> dict:
    """Time the self-attention of a layer by each kernel, and its rate; compare with the default."""
    return {
        f"{setting.name}: {name}": timed(kit, setting, name)
        for setting in SETTINGS[:3]
        for name in KERNELS
    }


def timed(kit: Kit, setting: Setting, name: str) -> dict:
    """Time one kernel for a chunk in a full window."""
    config, case = kit.case.config, kit.case
    tokens = case.height // PATCH[1] * (case.width // PATCH[2])
    shapes = [
        (setting.batch, frames * tokens, config.num_heads, config.head_dim)
        for frames in (setting.chunk, setting.window, setting.window)
    ]
    generator = torch.Generator(kit.device).manual_seed(0)
    like = dict(device=kit.device, dtype=kit.dtype, generator=generator)
    query, key, value = (torch.randn(shape, **like) for shape in shapes)
    expected = attend(query, key, value)
    try:
        with sdpa_kernel(KERNELS[name]) if KERNELS[name] else nullcontext():
            result = attend(query, key, value)
            seconds = statistics.median(
                clock(lambda: attend(query, key, value), kit.device) for _ in range(2 * ROUNDS)
            )
    except RuntimeError as error:
        return {"cannot_run": str(error).splitlines()[0][:120]}
    products = 4 * query.numel() * key.shape[1]
    return {
        "ms": 1e3 * seconds,
        "tflops": products / seconds / 1e12,
        "difference": float((result - expected).float().abs().max()),
    }
