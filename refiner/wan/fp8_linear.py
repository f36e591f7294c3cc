"""Linear layers that multiply fp8 numbers: half the bytes of bf16, faster where the GPU has them.

A weight is quantised once, with a scale per output row; an input on every call, with a scale per
token.
"""

import re
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal import CausalWan
from .module_tree import with_layers

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
LEAST_AMAX = 1e-12  # keeps the scale of a row of zeros above 0
ALIGNMENT = 16  # both sizes of a weight that `torch._scaled_mm` takes are multiples of it
# Whole names of the converted layers. Cross-attention's keys and values are computed once a prompt.
CONVERTED = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qo]|ffn\.[02])")


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 numbers and an fp32 scale per row [..., 1]: x ≈ numbers · scale."""
    amax = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).float()
    scale = amax.clamp(min=LEAST_AMAX) / LARGEST
    return (x / scale).to(E4M3).contiguous(), scale


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` multiplies with row-wise scales on this device.

    It takes CUDA compute capability 8.9 or higher; some builds of torch lack it there, too.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(ALIGNMENT, ALIGNMENT, device=device)
    try:
        scaled_product(*quantise(ones), *quantise(ones))
    except RuntimeError:
        return False
    return True


def check_fp8(device: torch.device) -> None:
    """Raise ValueError for a device that has no fp8 numbers."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"fp8 on {device}, which has no such numbers: use cuda, cpu or no --fp8")


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return x [N, in] · weight [out, in]ᵀ of quantised rows in bf16, by the fp8 kernel."""
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def reference_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return `scaled_product` by a wider kernel, which holds e4m3 numbers exactly; not faster."""
    wide = torch.float32 if x.device.type == "cpu" else torch.bfloat16
    product = F.linear(x.to(wide), weight.to(wide)).float()
    return (product * x_scale * weight_scale.t()).bfloat16()


class Fp8Linear(nn.Module):
    """A frozen linear layer with an fp8 weight; sampling only.

    Where the device does not multiply fp8, the same quantised values are multiplied in fp32 or
    bf16, which is as exact and slower.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantise a weight [out, in] on its device, where the layer is to stay."""
        super().__init__()
        numbers, scale = quantise(weight.detach())
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)  # [out, 1]
        self.register_parameter("bias", bias)
        aligned = not any(size % ALIGNMENT for size in weight.shape)
        self.is_fast = aligned and multiplies_fp8(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        product = scaled_product if self.is_fast else reference_product
        y = product(*quantise(x.flatten(0, -2)), self.weight, self.scale)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def fp8_layer(name: str, layer: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Return the layer of this name with an fp8 weight on `device`, if it is one to convert."""
    if not CONVERTED.fullmatch(name) or isinstance(layer, Fp8Linear):
        return layer
    return Fp8Linear(layer.weight.to(device or layer.weight.device), layer.bias)


def with_fp8(network: CausalWan, device: torch.device | None = None) -> CausalWan:
    """Return the network on `device`, with the products of its blocks in fp8.

    Weights go there one at a time. `network` holds the old ones: drop it to free them. All other
    modules are shared with it, and move as well. A converted network stays as it is.
    """
    layers = {}
    for name, module in network.model.named_modules():
        converted = fp8_layer(name, module, device)
        if converted is not module:
            layers[name] = converted
    model = with_layers(network.model, layers)
    return replace(network, model=model.to(device) if device else model, checkpointing=False)


def layer_bytes(name: str, out: int, into: int, dtype: torch.dtype, fp8: bool) -> int:
    """Bytes of a weight [out, in] in `dtype`, or with `fp8`, if converted, and of its scales."""
    if not fp8 or not CONVERTED.fullmatch(name):
        return out * into * dtype.itemsize
    return out * into * E4M3.itemsize + out * torch.float32.itemsize
