"""The memory of training: every write makes a new tensor, so the autograd graph stays valid."""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from ..wan.causal import KeyValue, Seen
from ..wan.rope import rotate
from .frames import FrameLedger
from .plan import MemoryPlan
from .policy import Held, check_ranks
from .positions import Placement
from .ring import mixed
from .store import pick_frames


class GraphMemory:
    """K/V of a window as immutable tensors, oldest frame first; same policies as `RingMemory`.

    Gradients flow into history that was committed with gradients enabled.
    """

    def __init__(self, plan: MemoryPlan, device: torch.device | None = None) -> None:
        """Take a plan; the tensors of a policy are on `device`."""
        self.plan = plan
        self.ledger = FrameLedger(plan)
        self.past: list[KeyValue] = []  # of the ledger's frames, by layer
        # by layer, mean raw key of each frame [B, F, H, D]; empty unless the policy reads it
        self.means: list[Tensor] = []
        self.policy = plan.policy.start(plan, device or "cpu")
        self.current: GraphView | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the history held now."""
        tensors = [tensor for layer in self.past for tensor in layer]
        return sum(tensor.nbytes for tensor in (*tensors, *self.means))

    def view(self, frames: Sequence[int], keep_pending: Tensor | None = None) -> "GraphView":
        """Return a new view for one pass over a chunk of these absolute latent frames.

        Where keep_pending[b], it holds the K/V of sample b from the previous pass.
        """
        if self.current is None or len(frames) > len(self.current.frames):
            self._open(len(frames))
        self.current = GraphView(self, tuple(frames), keep_pending)
        return self.current

    def _open(self, new: int) -> None:
        """Show the policy what a chunk of `new` frames displaces, then what it will see."""
        if leaving := self.ledger.leaving(new):
            self.policy.evicting(HistoryFrames(self, leaving))
            stored = [held.frame for held in self.ledger.held]
            self.ledger.make_room(new)
            self._evict(stored)
        self.policy.opening(HistoryFrames(self, self.ledger.visible(new)))

    def commit(self) -> None:
        """Append the K/V of the last pass; evict frames that no future chunk can attend to."""
        if self.current is None:
            raise ValueError("nothing to commit: no chunk was predicted since the last commit")
        layers, current = range(self.plan.layers), self.current
        new = [current.new[layer] for layer in layers]
        means = [current.new_means[layer] for layer in layers] if self.plan.policy.means else []
        if self.past:
            new = [join(*layer) for layer in zip(self.past, new, strict=True)]
            means = [torch.cat(pair, 1) for pair in zip(self.means, means, strict=True)]
        self.past, self.means = new, means
        stored = [held.frame for held in self.ledger.held] + list(current.frames)
        # Views of this chunk keep the policy as it was: backward may recompute their reads.
        self.policy = copy(self.policy)
        if evicted := self.ledger.commit(current.frames):
            self.policy.evicting(HistoryFrames(self, evicted, stored))
        self._evict(stored)

    def flush(self, keep_last: int, keep_sink: bool = True) -> None:
        """Drop all frames but the sink and the last `keep_last`."""
        stored = [held.frame for held in self.ledger.held]
        self.ledger.flush(keep_last, keep_sink)
        self._evict(stored)
        self.policy.flushed(keep_sink)

    def free(self) -> None:
        """Free every tensor."""
        self.past, self.means, self.current = [], [], None
        self.policy = self.plan.policy

    def replace(self, layer: int, ranks: Sequence[int], frames: KeyValue) -> None:
        """Replace frames of the history by rank, in new tensors."""
        old, size = self.past[layer], self.plan.frame_tokens
        index = torch.tensor(ranks, dtype=torch.long, device=old.key.device)
        parts = []
        for whole, part in zip(old, frames, strict=True):
            by_frame = whole.unflatten(1, (-1, size))
            replaced = by_frame.index_copy(1, index, part.unflatten(1, (-1, size)))
            parts.append(replaced.flatten(1, 2))
        self.past[layer] = KeyValue(*parts)

    def _evict(self, stored: list[int]) -> None:
        """Drop every stored frame that the ledger no longer holds."""
        ranks = ranks_of(self.ledger.held, stored)
        self.past = [select(layer, ranks, self.plan.frame_tokens) for layer in self.past]
        self.means = [mean if ranks is None else mean[:, ranks] for mean in self.means]
        self.current = None


def ranks_of(wanted: Sequence[Held], stored: Sequence[int]) -> list[int] | None:
    """Return the ranks of frames among the absolute indices `stored`; None for all of them."""
    if len(wanted) == len(stored):
        return None
    return [stored.index(held.frame) for held in wanted]


def select(layer: KeyValue, ranks: list[int] | None, frame_tokens: int) -> KeyValue:
    """Select the frames of a layer at these ranks; all of them if None."""
    if ranks is None:
        return layer
    index = torch.tensor(ranks, dtype=torch.long, device=layer.key.device)
    frames = (tensor.unflatten(1, (-1, frame_tokens)) for tensor in layer)
    return KeyValue(*(tensor[:, index].flatten(1, 2) for tensor in frames))


def join(old: KeyValue, new: KeyValue) -> KeyValue:
    """Concatenate keys and values along the tokens."""
    return KeyValue(torch.cat((old.key, new.key), 1), torch.cat((old.value, new.value), 1))


class HistoryFrames:
    """Past frames of a GraphMemory, keys as stored (see `refiner.memory.policy.Frames`)."""

    chunk = 0
    current: tuple[int, ...] = ()
    placement = Placement((), ())

    def __init__(
        self, memory: GraphMemory, past: Sequence[Held], stored: Sequence[int] | None = None
    ) -> None:
        """Select `past`; `stored` are the absolute indices in memory, by default the ledger's."""
        self.past, self.memory = past, memory
        self.places = range(len(past))
        stored = [held.frame for held in memory.ledger.held] if stored is None else stored
        self.ranks = ranks_of(past, stored)
        self.frame_tokens = memory.plan.frame_tokens
        # as they are now: a write makes new tensors
        self.whole, self.whole_means = list(memory.past), list(memory.means)
        self.layers: dict[int, KeyValue] = {}  # selected when they are read

    def means(self, layer: int) -> Tensor:
        """See `Frames`."""
        self.memory.policy.check_means()
        means = self.whole_means[layer]
        return means if self.ranks is None else means[:, self.ranks]

    def all(self, layer: int) -> KeyValue:
        """See `Frames`."""
        if layer not in self.layers:
            self.layers[layer] = select(self.whole[layer], self.ranks, self.frame_tokens)
        return self.layers[layer]

    def take(self, layer: int, ranks_BF: Tensor) -> KeyValue:
        """See `Frames`."""
        check_ranks(ranks_BF)
        return pick_frames(self.all(layer), ranks_BF, self.frame_tokens)

    def new(self, layer: int) -> KeyValue:
        """See `Frames`."""
        raise ValueError("there is no chunk between two chunks: read it in a policy's read()")

    def stored(self, layer: int, ranks: Sequence[int]) -> KeyValue:
        """See `Frames`."""
        return select(self.all(layer), list(ranks), self.frame_tokens)

    def put(self, layer: int, ranks: Sequence[int], frames: KeyValue) -> None:
        """See `Frames`."""
        held = [each.order for each in self.memory.ledger.held]
        self.memory.replace(layer, [held.index(self.past[rank].order) for rank in ranks], frames)


class GraphView:
    """One pass over a chunk, which attends to the past as it was when the view was made."""

    first = 0

    def __init__(
        self, memory: GraphMemory, frames: tuple[int, ...], keep_pending: Tensor | None
    ) -> None:
        self.plan, self.policy = memory.plan, memory.policy
        self.frequencies = memory.plan.frequencies
        self.keep_pending = keep_pending
        self.previous = None  # keys and values, and means, of the previous pass
        if keep_pending is not None:
            self.previous = (memory.current.new, memory.current.new_means)
        self.frames, self.chunk = frames, len(frames)
        self.past_positions, self.positions = memory.ledger.place(frames)
        self.history = HistoryFrames(memory, memory.ledger.visible(len(frames)))
        self.new: dict[int, KeyValue] = {}
        self.new_means: dict[int, Tensor] = {}

    def extend(
        self,
        layer: int,
        raw_key: Tensor,
        value: Tensor,
        table: Tensor,
        raw_query: Tensor | None = None,
    ) -> KeyValue | list[Seen] | None:
        """See `refiner.wan.causal.View`."""
        current = KeyValue(raw_key if self.plan.keys == "raw" else rotate(raw_key, table), value)
        if self.keep_pending is not None:
            current = mixed(self.keep_pending, self.previous[0][layer], current)
        # Recomputation calls extend() again; keep the tensors of the first run, which autograd
        # knows.
        self.new.setdefault(layer, current)
        if self.plan.policy.means:
            self._summarise(layer, raw_key)
        if raw_query is None:
            return None
        return self.policy.read(layer, raw_query, self.reading(current, self.positions))

    def reading(
        self, current: KeyValue, positions: Sequence[int], history: bool = True
    ) -> "GraphFrames":
        """Return the visible past and these tokens at these positions, for a policy to read."""
        past = self.history if history and self.past_positions else None
        placement = Placement(tuple(self.past_positions) if past else (), tuple(positions))
        return GraphFrames(self, past, placement, current)

    def _summarise(self, layer: int, raw_key: Tensor) -> None:
        """Store the mean key of each frame of the chunk."""
        mean = raw_key.detach().unflatten(1, (self.chunk, -1)).mean(dim=2)
        if self.keep_pending is not None:
            mean = torch.where(
                self.keep_pending[:, None, None, None], self.previous[1][layer], mean
            )
        self.new_means.setdefault(layer, mean)


class GraphFrames:
    """The visible past and the tokens of one pass in a layer (`refiner.memory.policy.Frames`)."""

    def __init__(
        self,
        view: GraphView,
        history: HistoryFrames | None,
        placement: Placement,
        tokens: KeyValue,
    ) -> None:
        self.plan, self.policy, self.current = view.plan, view.policy, view.frames
        self.history, self.tokens, self.placement = history, tokens, placement
        self.past = history.past if history else ()
        self.chunk = len(placement.chunk)
        self.places = range(len(self.past) + self.chunk)

    def means(self, layer: int) -> Tensor:
        """See `Frames`."""
        self.policy.check_means()
        if self.history is None:
            batch, _, heads, size = self.tokens.key.shape
            return self.tokens.key.new_zeros(batch, 0, heads, size)
        return self.history.means(layer)

    def all(self, layer: int) -> KeyValue:
        """See `Frames`."""
        seen = join(self.history.all(layer), self.tokens) if self.history else self.tokens
        return self._rotated(seen, (*self.placement.past, *self.placement.chunk))

    def new(self, layer: int) -> KeyValue:
        """See `Frames`."""
        return self._rotated(self.tokens, self.placement.chunk)

    def stored(self, layer: int, ranks: Sequence[int]) -> KeyValue:
        """See `Frames`."""
        return self.history.stored(layer, ranks)

    def put(self, layer: int, ranks: Sequence[int], frames: KeyValue) -> None:
        """See `Frames`."""
        raise ValueError("memory changes between two chunks only: replace frames in opening()")

    def _rotated(self, seen: KeyValue, positions: Sequence[int]) -> KeyValue:
        """Rotate raw keys; leave others as they are."""
        if self.plan.keys == "rotated":
            return seen
        return KeyValue(self.plan.rotate(seen.key, positions), seen.value)

    def take(self, layer: int, ranks_BF: Tensor) -> KeyValue:
        """See `Frames`."""
        check_ranks(ranks_BF)
        count = len(self.past)
        chunk = torch.arange(count, count + self.chunk, device=ranks_BF.device)
        ranks_BF = torch.cat((ranks_BF, chunk.expand(len(ranks_BF), -1)), dim=1)
        return pick_frames(self.all(layer), ranks_BF, self.plan.frame_tokens)
