"""Keys and values in host memory; two layers at a time on the device, the next copied ahead."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ...wan.causal import KeyValue
from ..store import Runs, Slots, Store, move_frames, pick_frames

BUFFERS = 2


def pinned_bytes(nbytes: int) -> int:
    """Return what torch allocates for a pinned tensor: the next power of two."""
    return 1 << (nbytes - 1).bit_length()


class Buffer:
    """Keys and values of one layer on the device, and which layer that is."""

    def __init__(self, slots: Slots, device: torch.device | str) -> None:
        like = dict(dtype=slots.dtype, device=device)
        self.content = KeyValue(*(torch.empty(slots.shape, **like) for _ in range(2)))
        self.layer: int | None = None
        self.ready: torch.cuda.Event | None = None  # set by the copy of a layer that may still run


class OffloadStore(Store):
    """The host holds every layer, in pinned memory where the device is CUDA.

    A side stream does all copies between host and device, in order, so a layer that is read from
    the host has all that was written to it. The device's stream waits for a layer before it uses
    it, and the side stream waits for the device before it overwrites or copies a buffer. The CPU
    waits for neither.
    """

    def __init__(self, slots: Slots, device: torch.device | str) -> None:
        self.slots, self.device = slots, torch.device(device)
        cuda = self.device.type == "cuda"
        like = dict(dtype=slots.dtype, pin_memory=cuda)
        self.host = [
            KeyValue(*(torch.empty(slots.shape, **like) for _ in range(2)))
            for _ in range(slots.layers)
        ]
        self.buffers = [Buffer(slots, device) for _ in range(BUFFERS)]
        self.written = 0  # slots up to the last that was ever written: no more are copied
        self.side = torch.cuda.Stream(self.device) if cuda else None
        if self.side is not None:
            for part in (part for buffer in self.buffers for part in buffer.content):
                part.record_stream(self.side)  # freed only when its copies are done

    @staticmethod
    def count_bytes(slots: Slots) -> int:
        """See `Store`."""
        return BUFFERS * 2 * math.prod(slots.shape) * slots.dtype.itemsize

    @staticmethod
    def count_host_bytes(slots: Slots) -> int:
        """See `Store`."""
        return slots.layers * 2 * pinned_bytes(math.prod(slots.shape) * slots.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """See `Store`."""
        return sum(part.nbytes for buffer in self.buffers for part in buffer.content)

    @property
    def host_nbytes(self) -> int:
        """See `Store`."""
        return sum(pinned_bytes(part.nbytes) for layer in self.host for part in layer)

    def put(self, layer: int, runs: Runs, key_BTHD: Tensor, value_BTHD: Tensor) -> None:
        """See `Store`: to the layer on the device, and from there to the host."""
        size, content = self.slots.frame_tokens, self._fetch(layer)
        for slot, frame, length in runs:
            self.written = max(self.written, slot + length)
            target = slice(slot * size, (slot + length) * size)
            for part, new in zip(content, (key_BTHD, value_BTHD), strict=True):
                part[:, target] = new[:, frame * size : (frame + length) * size]
        with self._aside():
            for slot, _, length in runs:
                self._copy(content, self.host[layer], slot, slot + length)

    def prefix(self, layer: int, frames: int) -> KeyValue:
        """See `Store`; views."""
        tokens = frames * self.slots.frame_tokens
        return KeyValue(*(part[:, :tokens] for part in self._fetch(layer)))

    def pick(self, layer: int, slots_BF: Tensor) -> KeyValue:
        """See `Store`."""
        return pick_frames(self._fetch(layer), slots_BF, self.slots.frame_tokens)

    def prefetch(self, layer: int) -> None:
        """See `Store`; leaves the layer before it on the device, which is in use."""
        self._load(layer, using=layer - 1)

    def move(self, slots: Sequence[int]) -> None:
        """See `Store`; waits for all copies, as it runs between two chunks."""
        if self.side is not None:
            self.side.synchronize()
        parts = (part for layer in self.host for part in layer)
        move_frames((part.unflatten(1, (-1, self.slots.frame_tokens)) for part in parts), slots)
        for buffer in self.buffers:
            buffer.layer = None

    def free(self) -> None:
        """See `Store`."""
        self.host, self.buffers = [], []

    def _fetch(self, layer: int) -> KeyValue:
        """Return a layer on the device, which the device's stream may use from now on."""
        buffer = self._load(layer, using=layer + 1)
        if buffer.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.ready)
            buffer.ready = None
        return buffer.content

    def _load(self, layer: int, using: int) -> Buffer:
        """Copy a layer to the device unless it is there, over any other but the one in use."""
        for buffer in self.buffers:
            if buffer.layer == layer:
                return buffer
        using %= self.slots.layers
        buffer = next(each for each in self.buffers if each.layer != using or using == layer)
        buffer.layer = layer
        with self._aside():
            self._copy(self.host[layer], buffer.content, 0, self.written)
            buffer.ready = self.side.record_event() if self.side is not None else None
        return buffer

    def _copy(self, source: KeyValue, target: KeyValue, first: int, end: int) -> None:
        """Copy slots, each sample by itself: its tokens are contiguous, so nothing is staged."""
        tokens = slice(first * self.slots.frame_tokens, end * self.slots.frame_tokens)
        for old, new in zip(source, target, strict=True):
            for sample in range(self.slots.batch):
                new[sample, tokens].copy_(old[sample, tokens], non_blocking=self.side is not None)

    def _aside(self) -> AbstractContextManager:
        """Queue copies on the side stream, behind what the device was given so far."""
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side)
