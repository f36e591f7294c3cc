"""The memory of sampling: allocated once, written in place, never copied while it grows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..wan.causal import KeyValue
from ..wan.rope import rotate, rotation_table
from .frames import FrameLedger
from .plan import MemoryPlan


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


def mixed(kept: Tensor, old: KeyValue, new: KeyValue) -> KeyValue:
    """The old keys and values of samples that are True in `kept` [B], the new ones of the others."""
    rows = kept[:, None, None, None]
    return KeyValue(torch.where(rows, old.key, new.key), torch.where(rows, old.value, new.value))


class RingMemory:
    """K/V of a window in place: sink slots, then a ring by frame.

    The current chunk is written over the frames that it evicts, so past and present are one contiguous read with no
    copy. Attention does not care in which order keys lie; positions are kept by slot.
    """

    def __init__(self, plan: MemoryPlan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.ledger = FrameLedger(plan)
        shape = (plan.batch, plan.held_frames * plan.frame_tokens, plan.heads, plan.head_dim)
        layers = range(plan.layers)
        self.keys = [torch.empty(shape, dtype=plan.dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=plan.dtype, device=device) for _ in layers]
        self.rotated = torch.empty(shape, dtype=plan.dtype, device=device) if plan.keys == "raw" else None
        self.current: RingView | None = None

    @property
    def nbytes(self) -> int:
        """Bytes now held."""
        rotated = [] if self.rotated is None else [self.rotated]
        return sum(x.nbytes for x in (*self.keys, *self.values, *rotated))

    def view(self, frames: Sequence[int], kept: Tensor | None = None) -> "RingView":
        """The place for a chunk of these absolute latent frames, behind the past that it sees.

        Of samples that are True in `kept` [B] a pass leaves what an earlier one wrote into it.
        """
        if self.current is None or self.current.frames != tuple(frames) or self.ledger.jump is not None:
            self.current = RingView(self, tuple(frames))
        self.current.kept = kept
        return self.current

    def commit(self) -> None:
        """What stands in the current place becomes past."""
        if self.current is None:
            raise ValueError("nothing to commit: no chunk was predicted since the last commit")
        self.ledger.commit(self.current.frames)
        self.current = None

    def flush(self, keep_last: int) -> None:
        """Forget all but the sink and the last `keep_last` frames (Infinity-RoPE's KV flush)."""
        slots = [self.ledger.slot(held.order) for held in self.ledger.flush(keep_last)]
        source = torch.tensor(slots, dtype=torch.long, device=self.keys[0].device)
        for buffer in (*self.keys, *self.values):
            frames = buffer.unflatten(1, (-1, self.plan.frame_tokens))
            frames[:, : len(slots)] = frames[:, source]
        self.current = None

    def free(self) -> None:
        """Let go of every buffer."""
        self.keys, self.values, self.rotated, self.current = [], [], None, None


class RingView:
    """Reads and writes of one chunk; every pass over the chunk overwrites the place of the one before."""

    first = 0
    kept: Tensor | None = None  # samples [B] whose place is not written

    def __init__(self, memory: RingMemory, frames: tuple[int, ...]) -> None:
        self.memory = memory
        self.frames = frames
        ledger, plan = memory.ledger, memory.plan
        past, self.positions = ledger.positions(frames)
        visible = ledger.visible(len(frames))
        slots = [ledger.slot(ledger.arrived + i) for i in range(len(frames))]
        self.pieces = runs(slots)
        self.used = (len(visible) + len(frames)) * plan.frame_tokens
        by_slot = dict(zip((ledger.slot(held.order) for held in visible), past, strict=True))
        by_slot |= dict(zip(slots, self.positions, strict=True))
        self.slot_positions = tuple(by_slot[slot] for slot in sorted(by_slot))

    def extend(self, layer: int, raw_key: Tensor, value: Tensor, table: Tensor) -> KeyValue:
        """See `refiner.wan.causal.View`. Writes in place: not for passes whose graph is kept."""
        self.write(layer, self.stored(raw_key, table), value)
        return self.read(layer, self.used, self.slot_positions)

    def stored(self, raw_key: Tensor, table: Tensor) -> Tensor:
        """A key as this memory keeps it."""
        return raw_key if self.memory.rotated is not None else rotate(raw_key, table)

    def write(self, layer: int, stored_key: Tensor, value: Tensor) -> None:
        """Put the chunk's keys and values into its place."""
        memory, size = self.memory, self.memory.plan.frame_tokens
        keys, values = memory.keys[layer], memory.values[layer]
        if self.kept is not None:
            stored_key, value = mixed(self.kept, self.own(layer), KeyValue(stored_key, value))
        for slot, frame, length in self.pieces:
            place, source = slice(slot * size, (slot + length) * size), slice(frame * size, (frame + length) * size)
            keys[:, place] = stored_key[:, source]
            values[:, place] = value[:, source]

    def own(self, layer: int) -> KeyValue:
        """What stands in the chunk's place."""
        memory, size = self.memory, self.memory.plan.frame_tokens
        places = [slice(slot * size, (slot + length) * size) for slot, _, length in self.pieces]
        keys, values = ([x[layer][:, place] for place in places] for x in (memory.keys, memory.values))
        return KeyValue(torch.cat(keys, 1), torch.cat(values, 1)) if len(places) > 1 else KeyValue(keys[0], values[0])

    def read(self, layer: int, tokens: int, positions: Sequence[int]) -> KeyValue:
        """The first `tokens` of a layer, keys rotated; `positions` are those of their frames, for raw keys."""
        memory = self.memory
        seen = KeyValue(memory.keys[layer][:, :tokens], memory.values[layer][:, :tokens])
        if memory.rotated is None:
            return seen
        plan = memory.plan
        table = rotation_table(positions, plan.height, plan.width, plan.head_dim, like=seen.key)
        return KeyValue(memory.rotated[:, :tokens].copy_(rotate(seen.key, table)), seen.value)
