"""Storage of the keys and values of a sampling memory."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..wan.causal import KeyValue

# contiguous pieces: (first slot, first frame of the source, frames)
Runs = Sequence[tuple[int, int, int]]


def pick_frames(layer: KeyValue, index_BF: Tensor, frame_tokens: int) -> KeyValue:
    """Frames of a layer [B, T, H, D] by index, for each sample; a copy."""
    samples = torch.arange(len(index_BF), device=index_BF.device)[:, None]
    frames = (part.unflatten(1, (-1, frame_tokens)) for part in layer)
    return KeyValue(*(part[samples, index_BF].flatten(1, 2) for part in frames))


def move_frames(buffers_BF: Iterable[Tensor], slots: Sequence[int]) -> None:
    """Move these frames of each buffer [B, F, ...] to the front, in this order."""
    for buffer in buffers_BF:
        source = torch.tensor(slots, dtype=torch.long, device=buffer.device)
        buffer[:, : len(slots)] = buffer[:, source]


@dataclass(frozen=True, slots=True)
class Slots:
    """Layout of a store: keys and values of this many frames in every layer."""

    layers: int
    batch: int
    frames: int
    frame_tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a layer's keys, and of its values: [B, T, H, D]."""
        return self.batch, self.frames * self.frame_tokens, self.heads, self.head_dim


class Store(Protocol):
    """Slots of one frame each, in every layer. Made of `Slots` and a device."""

    exact: ClassVar[bool] = True  # whether a read returns what was written, bit for bit
    static: ClassVar[bool] = False  # whether puts and reads do the same work for the same slots

    @staticmethod
    def count_bytes(slots: Slots) -> int:
        """Bytes that a store of these slots will allocate on its device."""
        ...

    @staticmethod
    def count_host_bytes(slots: Slots) -> int:
        """Bytes that a store of these slots will allocate in host memory besides."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated now on the device."""
        ...

    @property
    def host_nbytes(self) -> int:
        """Bytes allocated now in host memory besides."""
        return 0

    def put(self, layer: int, runs: Runs, key_BTHD: Tensor, value_BTHD: Tensor) -> None:
        """Write frames into slots."""
        ...

    def prefix(self, layer: int, frames: int) -> KeyValue:
        """Return the first `frames` slots [B, T, H, D], valid until another layer is read."""
        ...

    def pick(self, layer: int, slots_BF: Tensor) -> KeyValue:
        """Copy the slots chosen for each sample, in this order."""
        ...

    def prefetch(self, layer: int) -> None:
        """Prepare for a read of a layer."""
        ...

    def move(self, slots: Sequence[int]) -> None:
        """Move these slots to the front, in this order; the content of others is lost."""
        ...

    def free(self) -> None:
        """Free every buffer."""
        ...


class PlainStore(Store):
    """Tensors in the memory's dtype on its device: reads are slices."""

    static: ClassVar[bool] = True

    def __init__(self, slots: Slots, device: torch.device | str) -> None:
        self.frame_tokens = slots.frame_tokens
        like, layers = dict(dtype=slots.dtype, device=device), range(slots.layers)
        self.keys = [torch.empty(slots.shape, **like) for _ in layers]
        self.values = [torch.empty(slots.shape, **like) for _ in layers]

    @staticmethod
    def count_bytes(slots: Slots) -> int:
        """See `Store`."""
        return 2 * slots.layers * math.prod(slots.shape) * slots.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """See `Store`."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def put(self, layer: int, runs: Runs, key_BTHD: Tensor, value_BTHD: Tensor) -> None:
        """See `Store`."""
        size = self.frame_tokens
        for slot, frame, length in runs:
            target = slice(slot * size, (slot + length) * size)
            source = slice(frame * size, (frame + length) * size)
            self.keys[layer][:, target] = key_BTHD[:, source]
            self.values[layer][:, target] = value_BTHD[:, source]

    def prefix(self, layer: int, frames: int) -> KeyValue:
        """See `Store`; views."""
        tokens = frames * self.frame_tokens
        return KeyValue(self.keys[layer][:, :tokens], self.values[layer][:, :tokens])

    def pick(self, layer: int, slots_BF: Tensor) -> KeyValue:
        """See `Store`."""
        whole = KeyValue(self.keys[layer], self.values[layer])
        return pick_frames(whole, slots_BF, self.frame_tokens)

    def prefetch(self, layer: int) -> None:
        """Do nothing: every layer is on the device."""

    def move(self, slots: Sequence[int]) -> None:
        """See `Store`."""
        buffers = (*self.keys, *self.values)
        move_frames((each.unflatten(1, (-1, self.frame_tokens)) for each in buffers), slots)

    def free(self) -> None:
        """See `Store`."""
        self.keys, self.values = [], []
