"""Base of the policies that store frames of their own, from chunk to chunk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...wan.causal import KeyValue
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

    def slots(self, plan: "MemoryPlan") -> Slots:
        """Return the layout of the frames that it stores."""
        raise NotImplementedError

    def count_bytes(self, plan: "MemoryPlan") -> int:
        return PlainStore.count_bytes(self.slots(plan)) if plan.evicts else 0

    def start(self, plan: "MemoryPlan", device: torch.device | str) -> Policy:
        return self.State(self, plan, device) if plan.evicts else self

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        return frames.all(layer)


class Remembered(Policy):
    """Frames that a policy has stored for one memory, without their graph."""

    def __init__(self, policy: Remembering, plan: "MemoryPlan", device: torch.device | str) -> None:
        self.policy, self.plan, self.device = policy, plan, torch.device(device)
        self.read = policy.read
        self.own = PlainStore(policy.slots(plan), device)

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
            own = self.own.pick(layer, index)
            frames.put(layer, ranks, KeyValue(*(part.to(self.plan.dtype) for part in own)))

    def frame(self, tokens_BTHD: Tensor, place: int) -> Tensor:
        """Return a view of one frame of keys or values, without its graph."""
        return tokens_BTHD.detach().unflatten(1, (-1, self.plan.frame_tokens))[:, place]
