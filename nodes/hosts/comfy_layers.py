"""Layers of a model that ComfyUI loaded, as a refiner needs them: the weights that they compute with, and the room."""

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


def weights_on(device: torch.device, dtype: torch.dtype) -> Callable[[nn.Module], tuple[Tensor, Tensor | None]]:
    """Copies of a layer's weight and bias as it computes with them: patched, dequantised, brought to the device."""

    def weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True
        )
        try:
            whole = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            return tuple(None if part is None else part.to(device, dtype, copy=True) for part in (whole, bias))
        finally:
            comfy.ops.uncast_bias_weight(module, weight, bias, stream)

    return weights


def unmergeable(model: ModelPatcher, network: nn.Module) -> str | None:
    """Why a second copy of the layers would not be the model's own, in a few words; None where it would."""
    if model.injections:
        return f"the MODEL has injections ({', '.join(sorted(model.injections))[:80]})"
    for name, module in target_modules(network).items():
        kind = type(module)
        if kind.__module__ != comfy.ops.__name__:
            return f"{name} is a {kind.__module__}.{kind.__qualname__}, which keeps its weights in a way of its own"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name} has a hook or another forward"
    return None


def room_beside(model: ModelPatcher) -> int:
    """Bytes on the model's device that are left when all of the model is there; none where it is streamed."""
    device = model.load_device
    if management.is_device_cpu(device):
        return available_bytes(torch.device("cpu"))
    if model.is_dynamic():
        return 0
    return int(management.get_total_memory(device)) - model.model_size()


def fingerprint_of_live(network: nn.Module) -> str | None:
    """The fingerprint of loaded weights; None where they are not plain ones of 16 bits or more."""
    tensors = {name: network.get_parameter(name) for name in FINGERPRINTED}
    plain = all(
        tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 and not tensor.is_meta
        and not isinstance(tensor, QuantizedTensor)
        for tensor in tensors.values()
    )  # fmt: skip
    return fingerprint_of(tensors) if plain else None
