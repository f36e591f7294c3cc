"""Layers of a model that ComfyUI loaded: their effective weights, and the memory beside them."""

from collections.abc import Callable

import comfy.model_management as management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...refiner.estimate import available_bytes
from ...refiner.noise.file import FINGERPRINTED, fingerprint_of
from ...refiner.noise.refiner import target_modules


def weights_on(
    device: torch.device, dtype: torch.dtype
) -> Callable[[nn.Module], tuple[Tensor, Tensor | None]]:
    """Return a function that copies a layer's patched, dequantised weight and bias to a device."""

    def weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True
        )
        try:
            plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            copied_bias = None if bias is None else bias.to(device, dtype, copy=True)
            return plain.to(device, dtype, copy=True), copied_bias
        finally:
            comfy.ops.uncast_bias_weight(module, weight, bias, stream)

    return weights


def unmergeable(model: ModelPatcher, network: nn.Module) -> str | None:
    """Why merged copies of the layers could differ from the model, in a few words, or None."""
    if model.injections:
        return f"the MODEL has injections ({', '.join(sorted(model.injections))[:80]})"
    for name, module in target_modules(network).items():
        kind = type(module)
        if kind.__module__ != comfy.ops.__name__:
            return (
                f"{name} is a {kind.__module__}.{kind.__qualname__}, which keeps its weights in a"
                " way of its own"
            )
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name} has a hook or another forward"
    return None


def room_beside(model: ModelPatcher) -> int:
    """Bytes left on the device beside the whole model; 0 where its weights are streamed."""
    device = model.load_device
    if management.is_device_cpu(device):
        return available_bytes(torch.device("cpu"))
    if model.is_dynamic():
        return 0
    return int(management.get_total_memory(device)) - model.model_size()


def fingerprint_of_live(network: nn.Module) -> str | None:
    """Fingerprint loaded weights; None unless they are plain floats of 16 bits or more."""
    tensors = {name: network.get_parameter(name) for name in FINGERPRINTED}
    return fingerprint_of(tensors) if all(map(is_plain, tensors.values())) else None


def is_plain(tensor: Tensor) -> bool:
    if tensor.is_meta or isinstance(tensor, QuantizedTensor):
        return False
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
