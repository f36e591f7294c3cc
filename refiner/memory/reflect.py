"""The reflective K/V cache: what a refine pass sees besides its own tokens (AutoRefiner, section 3.4).

It attends to [history ‖ previous x0 ‖ its own]. Tokens of the previous x0 and of the noise have the same positions.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ..wan.causal import KeyValue, View
from ..wan.rope import rotate, rotation_table
from .graph import GraphMemory, GraphView
from .ring import RingMemory, RingView

History = Literal["shared", "none"]
Previous = Literal["pending", "joint", "none"]


@dataclass(frozen=True, slots=True)
class ReflectiveCache:
    """Table 4 of the paper as two switches.

    `history`: the base network's committed keys and values (`shared`), or `none`. `previous`, of the x0 that the level
    before predicted: `pending`, the keys and values that the base network wrote in predicting it; `joint`, those of
    the x0 itself, which goes through the refiner in the same call; or `none`.
    """

    history: History = "shared"
    previous: Previous = "pending"

    def __post_init__(self) -> None:
        for name, allowed in (("history", get_args(History)), ("previous", get_args(Previous))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known: use {' or '.join(allowed)}")


class Reflecting(Protocol):
    """A view for one refine pass; it changes nothing that a later pass reads."""

    positions: tuple[int, ...]
    first: int

    def extend(self, layer: int, raw_key: Tensor, value: Tensor, table: Tensor) -> KeyValue: ...


def reflect(memory: RingMemory | GraphMemory, frames: tuple[int, ...], cache: ReflectiveCache) -> View:
    """A view for a refine pass over the noise of the chunk `frames`, which was predicted once at least.

    With `joint` the pass takes [x0 ‖ noise] along the frames. A RingMemory needs spare frames in its plan.
    """
    view = memory.current
    if cache.previous == "pending" and (view is None or view.frames != frames):
        raise ValueError("a refine pass reads what the prediction before it wrote: predict this chunk first")
    if isinstance(memory, GraphMemory):
        return GraphReflection(memory, memory.current if view else memory.view(frames), cache)
    return RingReflection(memory, memory.view(frames), cache)


class GraphReflection:
    """For training: joins tensors, writes nowhere."""

    def __init__(self, memory: GraphMemory, view: GraphView, cache: ReflectiveCache) -> None:
        self.view, self.cache = view, cache
        joint = cache.previous == "joint"
        self.positions = view.positions * 2 if joint else view.positions
        self.first = len(view.positions) * memory.plan.frame_tokens if joint else 0

    def extend(self, layer: int, raw_key: Tensor, value: Tensor, table: Tensor) -> KeyValue:
        """See `refiner.wan.causal.View`."""
        view, plan = self.view, self.view.plan
        raw = plan.keys == "raw"
        parts, positions = [], []
        if self.cache.history == "shared" and view.past_positions:
            parts.append(view.past[layer])
            positions += view.past_positions
        if self.cache.previous == "pending":
            parts.append(view.new[layer])
            positions += view.positions
        parts.append(KeyValue(raw_key if raw else rotate(raw_key, table), value))
        key, value = (torch.cat(same, dim=1) for same in zip(*parts, strict=True))
        if not raw:
            return KeyValue(key, value)
        full = rotation_table((*positions, *self.positions), plan.height, plan.width, plan.head_dim, like=key)
        return KeyValue(rotate(key, full), value)


class RingReflection:
    """For sampling: what the pass writes goes into the spare places right behind the current chunk's."""

    def __init__(self, memory: RingMemory, view: RingView, cache: ReflectiveCache) -> None:
        self.view, self.cache, self.memory = view, cache, memory
        chunk = len(view.positions)
        if cache.previous != "none" and memory.plan.spare_frames < chunk:
            raise ValueError(
                f"memory has {memory.plan.spare_frames} spare frames and a refine pass over this chunk writes {chunk}:"
                " plan the memory with them"
            )
        self.joint = cache.previous == "joint"
        self.positions = view.positions * 2 if self.joint else view.positions
        self.first = chunk * memory.plan.frame_tokens if self.joint else 0

    def extend(self, layer: int, raw_key: Tensor, value: Tensor, table: Tensor) -> KeyValue:
        """See `refiner.wan.causal.View`."""
        view, first = self.view, self.first
        if self.cache.previous == "none":
            if self.cache.history == "shared":
                return view.extend(
                    layer, raw_key, value, table
                )  # over what was pending: the next prediction rewrites it
            return KeyValue(rotate(raw_key, table), value)
        stored = view.stored(raw_key, table)
        if self.joint:
            view.write(layer, stored[:, :first], value[:, :first])
        if self.cache.history == "none":
            return self._without_history(layer, stored[:, first:], value[:, first:])
        end = view.used + raw_key.shape[1] - first
        self.memory.keys[layer][:, view.used : end] = stored[:, first:]
        self.memory.values[layer][:, view.used : end] = value[:, first:]
        return view.read(layer, end, (*view.slot_positions, *view.positions))

    def _without_history(self, layer: int, stored_key: Tensor, value: Tensor) -> KeyValue:
        before, plan = self.view.own(layer), self.memory.plan
        key, value = torch.cat((before.key, stored_key), 1), torch.cat((before.value, value), 1)
        if self.memory.rotated is None:
            return KeyValue(key, value)
        table = rotation_table(self.view.positions * 2, plan.height, plan.width, plan.head_dim, like=key)
        return KeyValue(rotate(key, table), value)
