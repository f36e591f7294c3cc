"""A memory that is fed by hand: which keys and values does a chunk read?"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autorefiner.refiner.choices import choose
from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.policy import Policy
from autorefiner.refiner.memory.positions import POSITIONS
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.wan.causal import KeyValue
from autorefiner.refiner.wan.rope import rotation_table

from tiny import TINY

KINDS = (RingMemory, GraphMemory)
ONE_LAYER = replace(TINY, num_layers=1)
SIDE = 4  # of the latents


def plan_of(
    policy: Policy, frames: int, window: int, sink: int = 0, positions: str | None = None, **options
) -> MemoryPlan:
    """Plan a memory of one layer for clips of this many frames."""
    name = positions or policy.positions or "absolute"
    positions = choose(name, POSITIONS, "positions")
    return MemoryPlan.of(
        ONE_LAYER, (1, 16, frames, SIDE, SIDE), window_frames=window, sink_frames=sink,
        positions=positions, policy=policy, keys="raw", **options,
    )  # fmt: skip


def random_frames(plan: MemoryPlan, frames: int) -> KeyValue:
    """Return keys and values [B, F, P, H, D] of a clip."""
    shape = plan.batch, frames, plan.frame_tokens, plan.heads, plan.head_dim
    generator = torch.Generator().manual_seed(0)
    return KeyValue(*(torch.randn(shape, generator=generator).to(plan.dtype) for _ in range(2)))


def step(memory, clip: KeyValue, frames: Sequence[int]) -> KeyValue:
    """Pass a chunk of a clip through the memory and commit it; return what it read, by frame."""
    plan, view = memory.plan, memory.view(tuple(frames))
    key, value = (part[:, list(frames)].flatten(1, 2) for part in clip)
    table = rotation_table(view.positions, plan.height, plan.width, plan.head_dim, like=key)
    seen = view.extend(0, key, value, table, raw_query=key)
    seen = KeyValue(*(part.clone().unflatten(1, (-1, plan.frame_tokens)) for part in seen))
    memory.commit()
    return seen


def feed(memory, clip: KeyValue, frames: Sequence[int], chunk: int) -> list[KeyValue]:
    """Pass frames of a clip chunk by chunk; return what each chunk read."""
    return [step(memory, clip, frames[i : i + chunk]) for i in range(0, len(frames), chunk)]


def rotated(plan: MemoryPlan, keys_BFPHD: Tensor, positions: Sequence[int]) -> Tensor:
    """Rotate keys, by frame, to these temporal positions."""
    return plan.rotate(keys_BFPHD.flatten(1, 2), positions).unflatten(1, (-1, plan.frame_tokens))


def sorted_frames(layer: KeyValue) -> KeyValue:
    """Sort frames by their values: attention does not depend on the order of keys."""
    order = layer.value.sum((0, 2, 3, 4)).argsort()
    return KeyValue(layer.key[:, order], layer.value[:, order])


def same(one: KeyValue, other: KeyValue) -> bool:
    """Whether two reads hold the same frames, in any order."""
    pairs = zip(sorted_frames(one), sorted_frames(other), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)
