"""Stores of the sampling memory: another one in the place of the plain one changes no clip."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.policies import TopFrames
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.memory.store import STORES, PlainStore, Runs, Slots
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import best_of_n, self_forcing
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import KeyValue

from tiny import TINY, tiny_network
from tiny_refiner import pairs_for
from tiny_reward import indifferent

SF = PRESETS["self-forcing"]
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))


class Elsewhere(PlainStore):
    """Holds each layer upside down and copies it on every read."""

    def __init__(self, slots: Slots, device: torch.device | str) -> None:
        super().__init__(slots, device)
        self.frames, self.prefetched = slots.frames, []

    @staticmethod
    def count_bytes(slots: Slots) -> int:
        return PlainStore.count_bytes(slots)

    def put(self, layer: int, runs: Runs, key_BTHD: Tensor, value_BTHD: Tensor) -> None:
        for slot, frame, length in runs:
            for each in range(length):
                place = [(self.frames - 1 - slot - each, frame + each, 1)]
                super().put(layer, place, key_BTHD, value_BTHD)

    def prefix(self, layer: int, frames: int) -> KeyValue:
        return self.pick(layer, torch.arange(frames).expand(len(self.keys[layer]), -1))

    def pick(self, layer: int, slots_BF: Tensor) -> KeyValue:
        return super().pick(layer, self.frames - 1 - slots_BF)

    def prefetch(self, layer: int) -> None:
        self.prefetched.append(layer)


def clip(plan: RunPlan, store: type[PlainStore], refiner: Refiner | None) -> tuple[Tensor, Rollout]:
    def memory(memory_plan: MemoryPlan, device: torch.device) -> RingMemory:
        return RingMemory(replace(memory_plan, store=store), device)

    network = tiny_network()
    rollout = Rollout.of(network, CONTEXT, plan, WhiteNoise(0), memory=memory, refiner=refiner)
    with torch.no_grad():
        return torch.cat(list(self_forcing().run(rollout)), 2), rollout


@pytest.mark.parametrize("previous", [None, "pending", "joint", "none"])
@pytest.mark.parametrize(("keys", "policy"), [("rotated", None), ("raw", TopFrames(k=1))])
def test_another_store_gives_the_same_clip(previous, keys, policy) -> None:
    options = {"policy": policy} if policy else {}
    plan = RunPlan(SF.changed(window=9, sink=1), 14, 4, 6, batch=2, keys=keys, **options)
    network = tiny_network()
    refiner = previous and Refiner(
        merged(network, pairs_for(network)), ReflectiveCache("shared", previous)
    )
    plain, _ = clip(plan, PlainStore, refiner or None)
    other, rollout = clip(plan, Elsewhere, refiner or None)
    assert torch.equal(plain, other)
    assert {*rollout.memory.store.prefetched} == {*range(TINY.num_layers)}


@pytest.mark.parametrize("store", STORES.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_store_are_known_before_it_is_made(store, dtype) -> None:
    slots = Slots(3, 2, 5, 6, 4, 32, dtype)
    assert store.count_bytes(slots) == 2 * 3 * (2 * 5 * 6 * 4 * 32) * dtype.itemsize
    made = store(slots, "cpu")
    assert made.nbytes == store.count_bytes(slots)
    made.free()
    assert made.nbytes == 0


def test_candidates_read_by_the_policy() -> None:
    network, frames = tiny_network(), 9

    def chosen(policy: TopFrames | None) -> Tensor:
        plan = RunPlan(SF, frames, 4, 6, **({"policy": policy} if policy else {}))
        method = best_of_n(indifferent, 2)
        return torch.cat(list(sample(network, CONTEXT, plan, method=method)), 2)

    assert torch.equal(chosen(TopFrames(k=frames)), chosen(None))
    assert not torch.equal(chosen(TopFrames(k=1, recent=1)), chosen(None))
