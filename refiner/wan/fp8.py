"""Scaled fp8: published files store a weight divided by a scale, which has one of several names."""

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer names
FORMAT = "comfy_quant"
# Formats that `comfy_quant` may name; others pack weights or scale them in blocks.
FORMATS = ("float8_e4m3fn", "float8_e5m2")
# Layers of text encoders and transformers, of which a file scales all or none.
LINEAR = (
    ".SelfAttention.", ".DenseReluDense.", ".attn.", ".ffn.",
    ".self_attn.", ".cross_attn.", ".attn1.", ".attn2.",
)  # fmt: skip


def scale_names(stored: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the stored name of each scaled weight to that of its scale.

    Raises ValueError (without the file's name) for a scale without a weight, a weight with two
    scales, and an fp8 weight without a scale in a file that has scales, as it would be read
    unscaled.
    """
    scales: dict[str, str] = {}
    for name in stored:
        suffix = next((suffix for suffix in SCALES if name.endswith("." + suffix)), None)
        if suffix is None:
            continue
        weight = name.removesuffix(suffix) + "weight"
        if weight not in stored:
            raise ValueError(
                f"has {name} without its weight: the file is damaged, download it again"
            )
        if weight in scales:
            raise ValueError(
                f"has {name} and {scales[weight]}, two scales of one weight: pass another file"
            )
        scales[weight] = name
    unscaled_names = [
        name for name, tensor in stored.items() if name not in scales and _needs_scale(name, tensor)
    ]
    if scales and unscaled_names:
        raise ValueError(
            f"has no scale for {unscaled_names[0]}, as its other fp8 weights have:"
            " pass the bf16 or fp16 file"
        )
    return scales


def _needs_scale(name: str, tensor: Tensor) -> bool:
    is_matrix = tensor.ndim == 2 and name.endswith(".weight")
    is_linear = any(layer in name for layer in LINEAR) and "relative" not in name
    is_fp8 = tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    return is_matrix and is_linear and is_fp8


def unscaled(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """Multiply a weight [out, in] by its scale, in fp32.

    Raises ValueError unless the scale is one number, or one per row.
    """
    per_row = scale.shape in ((len(weight),), (len(weight), 1)) if weight.ndim == 2 else False
    if scale.numel() != 1 and not per_row:
        raise ValueError(
            f"has a scale of {list(scale.shape)} for {name}, whose weight is {list(weight.shape)}:"
            " scales are one number or one per row, pass the bf16 or fp16 file"
        )
    return weight.float() * scale.float().reshape(-1, *(1,) * (weight.ndim - 1))


def check_formats(stored: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Check that `comfy_quant` tensors announce plain scaled fp8.

    Raises ValueError (without the file's name) for any other format.
    """
    for name in (name for name in stored if name.endswith("." + FORMAT)):
        try:
            options = json.loads(bytes(read(name).flatten().to(torch.uint8).tolist()))
            known = options["format"] in FORMATS
        except (ValueError, KeyError, TypeError, RecursionError):
            options, known = "nothing readable", False
        if not known:
            raise ValueError(
                f"has {name} that says {str(options)[:80]}: pass the bf16, fp16 or scaled fp8 file"
            )
