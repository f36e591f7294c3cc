"""The memory of training: every write makes a new tensor, so a graph behind it stays valid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..wan.causal import KeyValue
from ..wan.rope import rotate, rotation_table
from .frames import FrameLedger, Held
from .plan import MemoryPlan
from .ring import mixed


class GraphMemory:
    """K/V of a window as immutable tensors, past frames oldest first; the same policies as `RingMemory`.

    Gradients flow into history when it was committed with a graph, and do not when it was committed under no_grad.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.ledger = FrameLedger(plan)
        self.past: list[KeyValue] = []  # per layer: stored keys and values of all frames of the ledger's past
        self.current: GraphView | None = None

    @property
    def nbytes(self) -> int:
        """Bytes now held as history."""
        return sum(part.nbytes for layer in self.past for part in layer)

    def view(self, frames: Sequence[int], kept: Tensor | None = None) -> "GraphView":
        """A fresh view for one pass over a chunk of these absolute latent frames.

        Of samples that are True in `kept` [B] it has what the pass before wrote.
        """
        self.current = GraphView(self, tuple(frames), kept)
        return self.current

    def commit(self) -> None:
        """What the last pass wrote becomes past; frames that no later chunk can see are dropped."""
        if self.current is None:
            raise ValueError("nothing to commit: no chunk was predicted since the last commit")
        new = [self.current.new[layer] for layer in range(self.plan.layers)]
        self.past = [_join(old, own) for old, own in zip(self.past, new, strict=True)] if self.past else new
        before = [held.frame for held in self.ledger.held] + list(self.current.frames)
        self.ledger.commit(self.current.frames)
        self._keep(before)

    def flush(self, keep_last: int) -> None:
        """Forget all but the sink and the last `keep_last` frames."""
        before = [held.frame for held in self.ledger.held]
        self.ledger.flush(keep_last)
        self._keep(before)

    def free(self) -> None:
        """Let go of every tensor."""
        self.past, self.current = [], None

    def _keep(self, stored: list[int]) -> None:
        """Drop every stored frame that the ledger no longer holds."""
        self.past = [self.select(layer, stored, self.ledger.held) for layer in self.past]
        self.current = None

    def select(self, layer: KeyValue, stored: list[int], wanted: Sequence[Held]) -> KeyValue:
        """The wanted frames of a layer that stores those with the absolute indices `stored`."""
        if len(wanted) == len(stored):
            return layer
        ranks = torch.tensor([stored.index(held.frame) for held in wanted], dtype=torch.long, device=layer.key.device)
        frames = (part.unflatten(1, (-1, self.plan.frame_tokens)) for part in layer)
        return KeyValue(*(part[:, ranks].flatten(1, 2) for part in frames))


def _join(old: KeyValue, new: KeyValue) -> KeyValue:
    return KeyValue(torch.cat((old.key, new.key), 1), torch.cat((old.value, new.value), 1))


class GraphView:
    """One pass over one chunk: what it saw is fixed when the view is made, what it wrote is kept for a commit."""

    first = 0

    def __init__(self, memory: GraphMemory, frames: tuple[int, ...], kept: Tensor | None) -> None:
        self.plan = memory.plan
        self.kept, self.before = kept, None if kept is None else memory.current.new
        self.frames = frames
        self.past_positions, self.positions = memory.ledger.positions(frames)
        held = memory.ledger.held
        stored, visible = [frame for _, frame in held], memory.ledger.visible(len(frames))
        self.past = [memory.select(layer, stored, visible) for layer in memory.past]
        self.new: dict[int, KeyValue] = {}

    def extend(self, layer: int, raw_key: Tensor, value: Tensor, table: Tensor) -> KeyValue:
        """See `refiner.wan.causal.View`."""
        raw = self.plan.keys == "raw"
        own = KeyValue(raw_key if raw else rotate(raw_key, table), value)
        if self.kept is not None:
            own = mixed(self.kept, self.before[layer], own)
        # A checkpointed block runs again in the backward pass: the first run's tensors are the ones in the graph.
        self.new.setdefault(layer, own)
        seen = _join(self.past[layer], own) if self.past and self.past_positions else own
        if not raw:
            return seen
        plan, positions = self.plan, (*self.past_positions, *self.positions)
        full = rotation_table(positions, plan.height, plan.width, plan.head_dim, like=raw_key)
        return KeyValue(rotate(seen.key, full), seen.value)
