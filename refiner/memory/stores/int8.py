"""Keys and values in 8 bits: a scale for each channel of a frame's keys, and for each value."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...wan.causal import KeyValue
from ..store import Runs, Slots, Store, move_frames, pick_frames

LARGEST = 127
SMALLEST_SCALE = 2.0**-100  # of zeros: 0 / 0 has no int8


def scales_of(x: Tensor, dim: int) -> Tensor:
    """Return the fp32 scales that take `x` to -127..127 along a dimension, which stays as 1.

    Quantising a dequantised tensor gives the same bytes: 127 · scale / 127 is the scale in fp32,
    and 127 · scale rounds to the largest value in a narrower dtype.
    """
    return x.abs().amax(dim, keepdim=True).float().div_(LARGEST).clamp_(min=SMALLEST_SCALE)


class Int8Store(Store):
    """Symmetric int8 codes with fp32 scales; a read dequantises into one layer for all.

    Keys [B, F, S, H, D] have a scale for each frame, head and channel (some channels are far larger
    than others), values one for each token and head.
    """

    exact: ClassVar[bool] = False
    static: ClassVar[bool] = True

    def __init__(self, slots: Slots, device: torch.device | str) -> None:
        self.frame_tokens = slots.frame_tokens
        shapes = shapes_of(slots)
        self.codes = [
            KeyValue(*(torch.empty(shapes[0], dtype=torch.int8, device=device) for _ in range(2)))
            for _ in range(slots.layers)
        ]
        self.scales = [
            KeyValue(*(torch.empty(shape, device=device) for shape in shapes[1:]))
            for _ in range(slots.layers)
        ]
        like = dict(dtype=slots.dtype, device=device)
        self.scratch = [torch.empty(shapes[0], **like) for _ in range(2)]

    @staticmethod
    def count_bytes(slots: Slots) -> int:
        """See `Store`."""
        codes, *scales = map(math.prod, shapes_of(slots))
        return slots.layers * (2 * codes + 4 * sum(scales)) + 2 * codes * slots.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """See `Store`."""
        return sum(buffer.nbytes for buffer in (*self._buffers(), *self.scratch))

    def put(self, layer: int, runs: Runs, key_BTHD: Tensor, value_BTHD: Tensor) -> None:
        """See `Store`."""
        sources = (x.unflatten(1, (-1, self.frame_tokens)) for x in (key_BTHD, value_BTHD))
        buffers = zip(sources, self.codes[layer], self.scales[layer], (2, 4), strict=True)
        for source, codes, scales, dim in buffers:
            for slot, frame, length in runs:
                frames = source[:, frame : frame + length]
                scale = scales_of(frames, dim)
                codes[:, slot : slot + length] = frames.div(scale).round_()
                scales[:, slot : slot + length] = scale

    def prefix(self, layer: int, frames: int) -> KeyValue:
        """See `Store`; dequantised."""
        buffers = zip(self.scratch, self.codes[layer], self.scales[layer], strict=True)
        return KeyValue(
            *(
                out[:, :frames].copy_(codes[:, :frames]).mul_(scale[:, :frames]).flatten(1, 2)
                for out, codes, scale in buffers
            )
        )

    def pick(self, layer: int, slots_BF: Tensor) -> KeyValue:
        """See `Store`."""
        whole = self.prefix(layer, self.scratch[0].shape[1])
        return pick_frames(whole, slots_BF, self.frame_tokens)

    def prefetch(self, layer: int) -> None:
        """Do nothing: every layer is on the device."""

    def move(self, slots: Sequence[int]) -> None:
        """See `Store`."""
        move_frames(self._buffers(), slots)

    def free(self) -> None:
        """See `Store`."""
        self.codes, self.scales, self.scratch = [], [], []

    def _buffers(self) -> list[Tensor]:
        return [buffer for layer in (*self.codes, *self.scales) for buffer in layer]


def shapes_of(slots: Slots) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a layer's codes, of the scales of its keys and of its values."""
    batch, frames, heads, size = slots.batch, slots.frames, slots.heads, slots.head_dim
    tokens = slots.frame_tokens
    return (
        (batch, frames, tokens, heads, size),
        (batch, frames, 1, heads, size),
        (batch, frames, tokens, heads, 1),
    )
