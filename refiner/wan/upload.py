"""Small tensors computed on the CPU and used on a device: noise, timesteps, rotations."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps

import torch
from torch import Tensor

Tables = dict[Hashable, Tensor]

_tables: ContextVar[Tables | None] = ContextVar("tables of the pass being replayed", default=None)


def upload(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy a tensor to a device and dtype without waiting for work queued there.

    Cast first, as MPS has no float64. CUDA stages pageable memory before the call returns, so the
    source may be freed; MPS may read it later, so there the copy blocks.
    """
    return tensor.to(dtype).to(device, non_blocking=device.type != "mps")


def cached_tensors(maxsize: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """LRU-cache a tensor-valued function of hashable arguments.

    Runs outside inference mode, so cached tensors also work under autograd.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        cached = lru_cache(maxsize=maxsize)(torch.inference_mode(False)(function))

        @wraps(function)
        def get(*key: Hashable) -> Tensor:
            tables = _tables.get()
            if tables is None:
                return cached(*key)
            if (function, key) not in tables:
                tables[function, key] = cached(*key)
            return tables[function, key]

        return get

    return decorate


@contextmanager
def holding(tables: Tables) -> Iterator[None]:
    """Look cached tensors up in `tables`, adding those that are missing.

    CUDA graphs read tensors in place, so their tables must not be evicted.
    """
    token = _tables.set(tables)
    try:
        yield
    finally:
        _tables.reset(token)
