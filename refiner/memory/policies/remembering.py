"""Base of the policies that store frames of their own, from chunk to chunk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...wan.causal import KeyValue
from ...wan.rope import span
from ...wan.upload import upload
from ..policy import Frames, Policy
from ..store import PlainStore, Slots

if TYPE_CHECKING:
    from ..plan import MemoryPlan


class Remembering(Policy):
    """A policy that remembers frames, keys before RoPE; `State` is what one memory gets."""

    copies: ClassVar[bool] = False
    raw: ClassVar[bool] = True
    State: ClassVar[type["Remembered"]]

    def stores(self, plan: "MemoryPlan") -> list[Slots]:
        """Return layouts of what it stores; none if it has nothing to do."""
        raise NotImplementedError

    def count_bytes(self, plan: "MemoryPlan") -> int:
        return sum(map(PlainStore.count_bytes, self.stores(plan))) if plan.evicts else 0

    def start(self, plan: "MemoryPlan", device: torch.device | str) -> Policy:
        return self.State(self, plan, device) if plan.evicts and self.stores(plan) else self

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        return frames.all(layer)


class Remembered(Policy):
    """Frames that a policy has stored for one memory, without their graph."""

    def __init__(self, policy: Remembering, plan: "MemoryPlan", device: torch.device | str) -> None:
        self.policy, self.plan, self.device = policy, plan, torch.device(device)
        self.own = PlainStore(policy.stores(plan)[0], device)

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        return self.policy.read(layer, raw_query_BNHD, frames)

    def remember(self, frames: Frames, ranks: Sequence[int], slots: Sequence[int]) -> None:
        """Copy past frames, by rank, to slots of its own."""
        runs = [(slot, frame, 1) for frame, slot in enumerate(slots)]
        for layer in range(self.plan.layers):
            key, value = frames.stored(layer, ranks)
            self.own.put(layer, runs, key.detach(), value.detach())

    def replace(self, frames: Frames, ranks: Sequence[int], slots: Sequence[int]) -> None:
        """Replace past frames, by rank, by those in slots of its own."""
        index = upload(torch.tensor(slots), self.device, torch.long).expand(self.plan.batch, -1)
        for layer in range(self.plan.layers):
            frames.put(layer, ranks, self.cast(*self.own.pick(layer, index)))

    def add(self, layer: int, frame: KeyValue, first: bool) -> None:
        """Add a frame to the one in the first slot of its own; the first one replaces that."""
        for total, part in zip(self.own.prefix(layer, 1), frame, strict=True):
            total.copy_(part.detach() if first else total + part.detach())

    def average(self, layer: int, count: int) -> KeyValue:
        """Return the average of the frames that were added."""
        return self.cast(*(total / count for total in self.own.prefix(layer, 1)))

    def insert(self, layer: int, frames: Frames, far: Sequence[KeyValue]) -> KeyValue:
        """Read everything, with further frames between the sink and the oldest recent frame.

        Further frames and sink have the positions right before that frame.
        """
        whole, sink = frames.all(layer), self.plan.sink_frames
        if not far or not frames.past:
            return whole
        keys, values = zip(frames.stored(layer, range(sink)), *far, strict=True)
        oldest = (*frames.placement.past, *frames.placement.chunk)[sink]
        positions = span(oldest - sink - len(far), sink + len(far))
        key = self.plan.rotate(torch.cat(keys, 1), positions)
        recent = slice(sink * self.plan.frame_tokens, None)
        return KeyValue(
            torch.cat((key, whole.key[:, recent]), 1),
            torch.cat((*values, whole.value[:, recent]), 1),
        )

    def cast(self, key: Tensor, value: Tensor) -> KeyValue:
        """Return keys and values in the dtype of the memory."""
        return KeyValue(key.to(self.plan.dtype), value.to(self.plan.dtype))

    def frame(self, tokens_BTHD: Tensor, place: int) -> Tensor:
        """Return a view of one frame of keys or values, without its graph."""
        return tokens_BTHD.detach().unflatten(1, (-1, self.plan.frame_tokens))[:, place]
