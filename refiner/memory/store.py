"""Where the keys and values of a sampling memory lie, and in what format."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..wan.causal import KeyValue

Runs = Sequence[
    tuple[int, int, int]
]  # contiguous pieces: (first slot, first frame of the source, frames)


def pick_frames(layer: KeyValue, index_BF: Tensor, frame_tokens: int) -> KeyValue:
    """Frames of a layer [B, T, H, D] by index, for each sample; a copy."""
    samples = torch.arange(len(index_BF), device=index_BF.device)[:, None]
    frames = (part.unflatten(1, (-1, frame_tokens)) for part in layer)
    return KeyValue(*(part[samples, index_BF].flatten(1, 2) for part in frames))


class Store(Protocol):
    """Slots of one frame each, in every layer."""

    @property
    def nbytes(self) -> int:
        """Bytes now allocated."""
        ...

    def put(self, layer: int, runs: Runs, key_BTHD: Tensor, value_BTHD: Tensor) -> None:
        """Write frames into slots."""
        ...

    def prefix(self, layer: int, frames: int) -> KeyValue:
        """The first `frames` slots [B, T, H, D]."""
        ...

    def pick(self, layer: int, slots_BF: Tensor) -> KeyValue:
        """Slots chosen for each sample, in this order; a copy."""
        ...

    def prefetch(self, layer: int) -> None:
        """Announce that a layer is read next."""
        ...

    def move(self, slots: Sequence[int]) -> None:
        """Move these slots to the front, in this order; what lay elsewhere is lost."""
        ...

    def free(self) -> None:
        """Let go of every buffer."""
        ...


class PlainStore:
    """Tensors in the memory's dtype on its device: reads are slices."""

    def __init__(
        self, layers: int, shape: tuple[int, int, int, int], frame_tokens: int, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        """`shape` is that of a layer's keys, [B, T, H, D]."""
        self.frame_tokens = frame_tokens
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]

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
        """Nothing to do: every layer lies on the device."""

    def move(self, slots: Sequence[int]) -> None:
        """See `Store`."""
        for buffer in (*self.keys, *self.values):
            frames = buffer.unflatten(1, (-1, self.frame_tokens))
            source = torch.tensor(slots, dtype=torch.long, device=buffer.device)
            frames[:, : len(slots)] = frames[:, source]

    def free(self) -> None:
        """See `Store`."""
        self.keys, self.values = [], []
