"""Scales of fp8 weights: published files keep a weight divided by a scale, under one of several
names."""

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SCALES = ("scale_weight", "weight_scale")  # ComfyUI's first and its present name
FORMATS = (
    "float8_e4m3fn",
    "float8_e5m2",
)  # of `comfy_quant`; other formats pack weights or scale them in blocks
FORMAT = "comfy_quant"
# Layers that are scaled all or none, of text encoders and transformers.
LINEAR = (
    ".SelfAttention.", ".DenseReluDense.", ".attn.", ".ffn.", ".self_attn.", ".cross_attn.", ".attn1.", ".attn2.",
)  # fmt: skip


def scale_names(stored: Mapping[str, Tensor]) -> dict[str, str]:
    """The name of each scaled weight's scale, by stored names.

    Raises ValueError (without the file's name) for a scale without a weight, a weight with two
    scales, and an fp8 weight without one in a file whose others have them: it would be read without
    a scale.
    """
    scales: dict[str, str] = {}
    for name in stored:
        part = next((part for part in SCALES if name.endswith("." + part)), None)
        if part is None:
            continue
        weight = name.removesuffix(part) + "weight"
        if weight not in stored:
            raise ValueError(
                f"has {name} without its weight: the file is damaged, download it again"
            )
        if weight in scales:
            raise ValueError(
                f"has {name} and {scales[weight]}, two scales of one weight: pass another file"
            )
        scales[weight] = name
    lacking = [
        name
        for name, tensor in stored.items()
        if name not in scales and _is_scaled_kind(name, tensor)
    ]
    if scales and lacking:
        raise ValueError(
            f"has no scale for {lacking[0]}, as its other fp8 weights have: pass the bf16 or fp16 file"
        )
    return scales


def _is_scaled_kind(name: str, tensor: Tensor) -> bool:
    is_linear = (
        tensor.ndim == 2 and name.endswith(".weight") and any(part in name for part in LINEAR)
    )
    return (
        is_linear
        and tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        and "relative" not in name
    )


def unscaled(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """A weight [out, in] times its scale, which is one number or one a row, in fp32; ValueError for
    other scales."""
    per_row = scale.shape in ((len(weight),), (len(weight), 1)) if weight.ndim == 2 else False
    if scale.numel() != 1 and not per_row:
        raise ValueError(
            f"has a scale of {list(scale.shape)} for {name}, whose weight is {list(weight.shape)}: scales are one"
            " number or one a row, pass the bf16 or fp16 file"
        )
    return weight.float() * scale.float().reshape(-1, *(1,) * (weight.ndim - 1))


def check_formats(stored: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Raise ValueError (without the file's name) for weights in a format of ComfyUI's that is not
    plain scaled fp8."""
    for name in (name for name in stored if name.endswith("." + FORMAT)):
        try:
            said = json.loads(bytes(read(name).flatten().to(torch.uint8).tolist()))
            known = said["format"] in FORMATS
        except (ValueError, KeyError, TypeError, RecursionError):
            said, known = "nothing readable", False
        if not known:
            raise ValueError(
                f"has {name} that says {str(said)[:80]}: pass the bf16, fp16 or scaled fp8 file"
            )
