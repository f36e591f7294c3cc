"""The reflective K/V cache, which a refine pass attends to (AutoRefiner, section 3.4).

A refine pass attends to [history ‖ previous x0 ‖ noise]. Tokens of the previous x0 and of the noise
have the same positions.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..wan.causal import KeyValue, Kind, Seen, View
from ..wan.rope import rotate
from .graph import GraphMemory, GraphView, join
from .positions import Placement
from .ring import RingMemory, RingView, SlotFrames

History = Literal["shared", "none"]
Previous = Literal["pending", "joint", "none"]


@dataclass(frozen=True, slots=True)
class ReflectiveCache:
    """Table 4 of the paper as two switches.

    `history`: `shared`, the base network's committed keys and values, or `none`. `previous`, for
    the x0 predicted at the level before: `pending`, the keys and values that the base network wrote
    while predicting it; `joint`, those of the x0 itself, which goes through the refiner in the same
    call; or `none`.
    """

    history: History = "shared"
    previous: Previous = "pending"

    def __post_init__(self) -> None:
        for name, allowed in (("history", get_args(History)), ("previous", get_args(Previous))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not known: use {' or '.join(allowed)}"
                )


def reflect(
    memory: RingMemory | GraphMemory, frames: tuple[int, ...], cache: ReflectiveCache
) -> View:
    """Return a view for a refine pass over the noise of the chunk `frames`, predicted before.

    With `joint` the pass takes [x0 ‖ noise] along the frames. It changes nothing that a later pass
    reads. A RingMemory needs spare frames in its plan.
    """
    view = memory.current
    if cache.previous == "pending" and (view is None or view.frames != frames):
        raise ValueError(
            "a refine pass reads keys and values of a prediction: predict this chunk first"
        )
    if isinstance(memory, GraphMemory):
        return GraphReflection(view or memory.view(frames), cache)
    return RingReflection(memory, memory.view(frames), cache)


class GraphReflection:
    """Concatenate tensors for a refine pass in training, without writing to memory."""

    def __init__(self, view: GraphView, cache: ReflectiveCache) -> None:
        self.view, self.cache, self.frequencies = view, cache, view.frequencies
        joint = cache.previous == "joint"
        self.positions = view.positions * 2 if joint else view.positions
        self.first = len(view.positions) * view.plan.frame_tokens if joint else 0

    def extend(
        self,
        layer: int,
        raw_key: Tensor,
        value: Tensor,
        table: Tensor,
        raw_query: Tensor | None = None,
    ) -> KeyValue | list[Seen] | None:
        """See `refiner.wan.causal.View`."""
        view, positions = self.view, self.positions
        current = KeyValue(raw_key if view.plan.keys == "raw" else rotate(raw_key, table), value)
        if self.cache.previous == "pending":
            current, positions = join(view.new[layer], current), (*view.positions, *positions)
        reading = view.reading(current, positions, history=self.cache.history == "shared")
        return view.policy.read(layer, raw_query, reading)


class RingReflection(SlotFrames):
    """Write the tokens of a refine pass to the spare slots after the current chunk (sampling)."""

    def __init__(self, memory: RingMemory, view: RingView, cache: ReflectiveCache) -> None:
        chunk, spare = len(view.positions), memory.plan.spare_frames
        if cache.previous != "none" and spare < chunk:
            raise ValueError(
                f"memory has {spare} spare frames and a refine pass over this chunk writes {chunk}:"
                " plan the memory with them"
            )
        spare_slots = range(view.used, view.used + chunk)
        super().__init__(memory, view.past, (*view.chunk_slots, *spare_slots))
        self.view, self.cache, self.frequencies = view, cache, view.frequencies
        self.joint = cache.previous == "joint"
        self.positions = view.positions * 2 if self.joint else view.positions
        self.first = chunk * memory.plan.frame_tokens if self.joint else 0
        self.current = view.current
        self.placement = Placement(view.placement.past, view.positions * 2)

    @property
    def kind(self) -> Kind | None:
        """See `refiner.wan.causal.View`."""
        kind = self.view.kind
        return kind and Kind((self.cache, kind.places), kind.chunk)

    def extend(
        self,
        layer: int,
        raw_key: Tensor,
        value: Tensor,
        table: Tensor,
        raw_query: Tensor | None = None,
    ) -> KeyValue | list[Seen] | None:
        """See `refiner.wan.causal.View`."""
        view, first, cache = self.view, self.first, self.cache
        if cache.previous == "none":
            if cache.history == "none":
                return KeyValue(self.memory.plan.rope(raw_key, table), value)
            # Overwrites the pending K/V, which the next prediction overwrites before any read.
            return view.extend(layer, raw_key, value, table, raw_query)
        self.memory.store.prefetch((layer + 1) % self.memory.plan.layers)
        stored = view.as_stored(raw_key, table)
        if self.joint:
            view.write(layer, stored[:, :first], value[:, :first])
        noise_key, noise_value = stored[:, first:], value[:, first:]
        if cache.history == "none":
            return self._without_history(layer, noise_key, noise_value)
        frames = len(view.positions)
        self.memory.store.put(layer, [(view.used, 0, frames)], noise_key, noise_value)
        return self.memory.policy.read(layer, raw_query, self)

    def all(self, layer: int) -> KeyValue:
        """See `refiner.memory.policy.Frames`."""
        view, frames = self.view, len(self.view.positions)
        return view.read(layer, view.used + frames, (*view.slot_positions, *view.positions))

    def _without_history(self, layer: int, stored_key: Tensor, value: Tensor) -> KeyValue:
        seen, plan = join(self.view.pending(layer), KeyValue(stored_key, value)), self.memory.plan
        if self.memory.rotated is None:
            return seen
        return KeyValue(plan.rotate(seen.key, self.placement.chunk), seen.value)
