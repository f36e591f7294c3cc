"""The memory of sampling: allocated once, written in place, never copied."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..wan.causal import KeyValue, Kind, Seen
from ..wan.upload import upload
from .frames import FrameLedger
from .plan import MemoryPlan
from .policy import Held, check_ranks
from .positions import Placement
from .store import Runs, Store, pick_frames


def runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut a chunk's slots into contiguous pieces (first slot, first frame of the chunk, frames)."""
    pieces: list[tuple[int, int, int]] = []
    for frame, slot in enumerate(slots):
        if pieces and pieces[-1][0] + pieces[-1][2] == slot:
            first, offset, length = pieces[-1]
            pieces[-1] = (first, offset, length + 1)
        else:
            pieces.append((slot, frame, 1))
    return pieces


def mixed(keep_pending: Tensor, old: KeyValue, new: KeyValue) -> KeyValue:
    """Take the old keys and values where `keep_pending` [B], else the new ones."""
    rows = keep_pending[:, None, None, None]
    return KeyValue(torch.where(rows, old.key, new.key), torch.where(rows, old.value, new.value))


class RingMemory:
    """K/V of a window in place: sink slots, then a ring by frame.

    The current chunk overwrites the frames that it evicts, so past and present are one contiguous
    read without a copy. Attention does not depend on the order of keys; positions are tracked by
    slot.
    """

    def __init__(self, plan: MemoryPlan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.ledger = FrameLedger(plan)
        self.store: Store = plan.store(plan.slots, device)
        like = dict(dtype=plan.dtype, device=device)
        self.rotated = torch.empty(plan.slots.shape, **like) if plan.keys == "raw" else None
        self.means: list[Tensor] = []  # by layer, of the raw keys of each slot [B, F, H, D]
        if plan.policy.means:
            shape = (plan.batch, plan.held_frames, plan.heads, plan.head_dim)
            self.means = [torch.empty(shape, **like) for _ in range(plan.layers)]
        self.device = torch.device(device)
        self.policy = plan.policy.start(plan, device)
        self.current: RingView | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        rotated = 0 if self.rotated is None else self.rotated.nbytes
        own = sum(mean.nbytes for mean in self.means) + self.plan.policy.count_bytes(self.plan)
        return self.store.nbytes + rotated + own

    def view(self, frames: Sequence[int], keep_pending: Tensor | None = None) -> "RingView":
        """Return the view of a chunk of these absolute latent frames and of its visible past.

        Where keep_pending[b], a pass leaves the pending K/V of sample b untouched.
        """
        frames = tuple(frames)
        if self.current is None or self.current.frames != frames or self.ledger.next_cut:
            if self.current is None or len(frames) > len(self.current.frames):
                self._open(len(frames))
            elif len(frames) < len(self.current.frames):
                # the longer pass left a gap in the ring
                self._keep(self.ledger.flush(len(self.ledger.held)))
            self.current = RingView(self, frames)
        self.current.keep_pending = keep_pending
        return self.current

    def _open(self, new: int) -> None:
        """Show the policy what a chunk of `new` frames overwrites, then what it will see."""
        if leaving := self.ledger.leaving(new):
            self.policy.evicting(HeldFrames(self, leaving))
            self.ledger.make_room(new)
        self.policy.opening(HeldFrames(self, self.ledger.visible(new)))

    def commit(self) -> None:
        """Append the current chunk to the past."""
        if self.current is None:
            raise ValueError("nothing to commit: no chunk was predicted since the last commit")
        if evicted := self.ledger.commit(self.current.frames):
            self.policy.evicting(HeldFrames(self, evicted))  # not overwritten yet
        self.current = None

    def flush(self, keep_last: int, keep_sink: bool = True) -> None:
        """Drop all frames but the sink and the last `keep_last` (KV flush of Infinity-RoPE)."""
        self._keep(self.ledger.flush(keep_last, keep_sink))
        self.policy.flushed(keep_sink)
        self.current = None

    def _keep(self, remaining: Sequence[Held]) -> None:
        """Move frames to the first slots."""
        slots = [self.ledger.slot(held.order) for held in remaining]
        if slots == list(range(len(slots))):
            return
        self.store.move(slots)
        for mean in self.means:
            mean[:, : len(slots)] = mean[:, slots]

    def free(self) -> None:
        """Free every buffer."""
        self.store.free()
        self.policy = self.plan.policy
        self.means, self.rotated, self.current = [], None, None


class SlotFrames:
    """Frames in slots of a RingMemory, as a policy reads them (`refiner.memory.policy.Frames`)."""

    current: tuple[int, ...] = ()
    placement = Placement((), ())

    def __init__(
        self, memory: RingMemory, past: Sequence[Held], chunk_slots: Sequence[int]
    ) -> None:
        self.memory, self.past, self.chunk = memory, past, len(chunk_slots)
        self.past_slots = [memory.ledger.slot(held.order) for held in past]
        self.chunk_slots = list(chunk_slots)
        self.places: Sequence[int] = [*self.past_slots, *chunk_slots]

    def means(self, layer: int) -> Tensor:
        """See `Frames`."""
        self.memory.plan.policy.check_means()
        return self.memory.means[layer][:, self._index(self.past_slots)]

    def take(self, layer: int, ranks_BF: Tensor) -> KeyValue:
        """See `Frames`."""
        check_ranks(ranks_BF)
        chunk_BF = self._index(self.chunk_slots).expand(len(ranks_BF), -1)
        slots_BF = torch.cat((self._index(self.past_slots)[ranks_BF], chunk_BF), dim=1)
        if self.memory.rotated is None:
            return self.memory.store.pick(layer, slots_BF)
        return pick_frames(self.all(layer), slots_BF, self.memory.plan.frame_tokens)

    def all(self, layer: int) -> KeyValue:
        """See `Frames`."""
        raise NotImplementedError

    def new(self, layer: int) -> KeyValue:
        """See `Frames`."""
        seen, slots = self.memory.store, self._index(self.chunk_slots)
        new = seen.pick(layer, slots.expand(self.memory.plan.batch, -1))
        if self.memory.rotated is None:
            return new
        return new._replace(key=self.memory.plan.rotate(new.key, self.placement.chunk))

    def stored(self, layer: int, ranks: Sequence[int]) -> KeyValue:
        """See `Frames`."""
        slots = self._index([self.past_slots[rank] for rank in ranks])
        return self.memory.store.pick(layer, slots.expand(self.memory.plan.batch, -1))

    def put(self, layer: int, ranks: Sequence[int], frames: KeyValue) -> None:
        """See `Frames`."""
        self.memory.store.put(layer, runs([self.past_slots[rank] for rank in ranks]), *frames)

    def _index(self, slots: Sequence[int]) -> Tensor:
        return upload(torch.tensor(slots, dtype=torch.long), self.memory.device, torch.long)


class HeldFrames(SlotFrames):
    """Frames between two chunks, keys as stored."""

    def __init__(self, memory: RingMemory, past: Sequence[Held]) -> None:
        super().__init__(memory, past, ())
        self.places = range(len(past))

    def all(self, layer: int) -> KeyValue:
        """See `Frames`; a copy."""
        slots = self._index(self.past_slots).expand(self.memory.plan.batch, -1)
        return self.memory.store.pick(layer, slots)

    def take(self, layer: int, ranks_BF: Tensor) -> KeyValue:
        """See `Frames`."""
        check_ranks(ranks_BF)
        return self.memory.store.pick(layer, self._index(self.past_slots)[ranks_BF])


class RingView(SlotFrames):
    """Read and write one chunk; every pass overwrites the K/V of the pass before."""

    first = 0
    keep_pending: Tensor | None = None  # [B]

    def __init__(self, memory: RingMemory, frames: tuple[int, ...]) -> None:
        ledger = memory.ledger
        self.current = self.frames = frames
        slots = [ledger.slot(ledger.arrived + i) for i in range(len(frames))]
        super().__init__(memory, ledger.visible(len(frames)), slots)
        self.placement = ledger.place(frames)
        past, self.positions = self.placement
        self.frequencies = memory.plan.frequencies
        self.pieces: Runs = runs(slots)
        self.used = len(self.past) + len(frames)  # slots
        by_slot = dict(zip(self.past_slots, past, strict=True))
        by_slot |= dict(zip(slots, self.positions, strict=True))
        self.slot_positions = tuple(by_slot[slot] for slot in sorted(by_slot))

    @property
    def kind(self) -> Kind | None:
        """See `refiner.wan.causal.View`."""
        plan = self.memory.plan
        if not plan.static or self.keep_pending is not None:
            return None
        positions = self.slot_positions if plan.keys == "raw" else ()
        return Kind((id(self.memory), *self.pieces, self.used, positions), self.frames)

    def extend(
        self,
        layer: int,
        raw_key: Tensor,
        value: Tensor,
        table: Tensor,
        raw_query: Tensor | None = None,
    ) -> KeyValue | list[Seen] | None:
        """See `refiner.wan.causal.View`. Writes in place, so not for passes with autograd."""
        self.memory.store.prefetch((layer + 1) % self.memory.plan.layers)
        self.write(layer, self.as_stored(raw_key, table), value)
        if self.memory.means:
            self._summarise(layer, raw_key)
        return None if raw_query is None else self.memory.policy.read(layer, raw_query, self)

    def all(self, layer: int) -> KeyValue:
        """See `refiner.memory.policy.Frames`."""
        return self.read(layer, self.used, self.slot_positions)

    def as_stored(self, raw_key: Tensor, table: Tensor) -> Tensor:
        """Return a key as this memory stores it."""
        return raw_key if self.memory.rotated is not None else self.memory.plan.rope(raw_key, table)

    def write(self, layer: int, stored_key: Tensor, value: Tensor) -> None:
        """Write the chunk's keys and values to its slots."""
        new = KeyValue(stored_key, value)
        if self.keep_pending is not None:
            new = mixed(self.keep_pending, self.pending(layer), new)
        self.memory.store.put(layer, self.pieces, *new)

    def _summarise(self, layer: int, raw_key: Tensor) -> None:
        """Store the mean key of each frame of the chunk."""
        means, new = self.memory.means[layer], raw_key.unflatten(1, (self.chunk, -1)).mean(dim=2)
        for slot, frame, length in self.pieces:
            source, target = new[:, frame : frame + length], means[:, slot : slot + length]
            if self.keep_pending is not None:
                source = torch.where(self.keep_pending[:, None, None, None], target, source)
            target.copy_(source)

    def pending(self, layer: int) -> KeyValue:
        """Return the keys and values in the chunk's slots."""
        size, last = self.memory.plan.frame_tokens, max(self.chunk_slots) + 1
        keys, values = self.memory.store.prefix(layer, last)
        places = [slice(slot * size, (slot + length) * size) for slot, _, length in self.pieces]
        pieces = [KeyValue(keys[:, place], values[:, place]) for place in places]
        if len(pieces) == 1:
            return pieces[0]
        return KeyValue(*(torch.cat(tensors, 1) for tensors in zip(*pieces, strict=True)))

    def read(self, layer: int, frames: int, positions: Sequence[int]) -> KeyValue:
        """Return the first `frames` slots of a layer; rotate raw keys to `positions`."""
        memory, plan = self.memory, self.memory.plan
        seen = memory.store.prefix(layer, frames)
        if memory.rotated is None:
            return seen
        rotated = memory.rotated[:, : frames * plan.frame_tokens]
        return KeyValue(rotated.copy_(plan.rotate(seen.key, positions)), seen.value)
