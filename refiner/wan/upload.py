"""Small tensors that are made on the CPU and used on a device: noise, timesteps, rotations."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps

import torch
from torch import Tensor

Tables = dict[Hashable, Tensor]

_held: ContextVar[Tables | None] = ContextVar(
    "tables that whoever replays a pass holds", default=None
)


def upload(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on a device in this dtype, without waiting for the work that is queued there.

    It is cast first: MPS has no float64. CUDA stages ordinary memory before the call returns, so
    the source may go; MPS may read it later, so there it waits.
    """
    return tensor.to(dtype).to(device, non_blocking=device.type != "mps")


def remembered(kept: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Of a function of hashable arguments, whose last `kept` tensors are remembered; what was made
    while sampling may be asked for in training."""

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        last = lru_cache(maxsize=kept)(torch.inference_mode(False)(function))

        @wraps(function)
        def get(*key: Hashable) -> Tensor:
            held = _held.get()
            if held is None:
                return last(*key)
            if (function, key) not in held:
                held[function, key] = last(*key)
            return held[function, key]

        return get

    return decorate


@contextmanager
def holding(tables: Tables) -> Iterator[None]:
    """Every table that is asked for inside comes from `tables`, and is put there first where it is
    missing."""
    token = _held.set(tables)
    try:
        yield
    finally:
        _held.reset(token)
