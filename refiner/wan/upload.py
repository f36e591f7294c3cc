"""Small tensors computed on the CPU and used on a device: noise, timesteps, rotations."""

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
from torch import Tensor

Tables = dict[Hashable, Tensor]


def upload(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy a tensor to a device and dtype without waiting for work queued there.

    Cast first, as MPS has no float64. CUDA stages pageable memory before the call returns, so the
    source may be freed; MPS may read it later, so there the copy blocks.
    """
    return tensor.to(dtype).to(device, non_blocking=device.type != "mps")


class TensorCache:
    """An LRU cache of a tensor-valued function of hashable arguments.

    The function runs outside inference mode, so cached tensors also work under autograd. While
    `held` is a table, every tensor asked for stays in it: a CUDA graph reads tensors in place, so
    whoever captures one keeps those of its pass from eviction.
    """

    def __init__(self, function: Callable[..., Tensor], maxsize: int) -> None:
        self.function = function
        self.cached = lru_cache(maxsize=maxsize)(torch.inference_mode(False)(function))
        self.held: Tables | None = None

    def __call__(self, *key: Hashable) -> Tensor:
        if self.held is None:
            return self.cached(*key)
        place = (self.function, key)
        if place not in self.held:
            self.held[place] = self.cached(*key)
        return self.held[place]


def cached_tensors(maxsize: int) -> Callable[[Callable[..., Tensor]], TensorCache]:
    """Decorate a function with a `TensorCache` of this size."""
    return lambda function: TensorCache(function, maxsize)
