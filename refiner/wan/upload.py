"""Small tensors that are made on the CPU and used on a device: noise, timesteps, rotations."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on a device in this dtype, without waiting for the work that is queued there.

    It is cast first: MPS has no float64. CUDA stages ordinary memory before the call returns, so the source may go; MPS
    may read it later, so there it waits.
    """
    return tensor.to(dtype).to(device, non_blocking=device.type != "mps")
