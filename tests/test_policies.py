"""Hold every memory policy to this: memories agree, samples do not mix, bytes are counted."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.choices import choose
from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.policies import POLICIES as TABLE
from autorefiner.refiner.memory.policies import HeadWindows, TopFrames, Window
from autorefiner.refiner.memory.policy import Frames, Policy
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.memory.store import PlainStore
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan, suggested
from autorefiner.refiner.samplers import self_forcing
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.timeline import Flush, Recache, Scene, Timeline
from autorefiner.refiner.training.self_rollout import self_rollout
from autorefiner.refiner.wan.causal import KeyValue
from autorefiner.refiner.wan.transformer import WanConfig

from tiny import tiny_network
from tiny_refiner import pairs_for

CONFIG = WanConfig(dim=128, num_heads=2, ffn_dim=128, num_layers=2, text_dim=32, text_len=8)
# two levels are enough to tell a first pass from a later one
PRESET = PRESETS["self-forcing"].changed(levels=(1000, 500), window=9, sink=3)
ONE_LEVEL = PRESET.changed(levels=(1000,))
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
FRAMES, HEIGHT, WIDTH = 24, 4, 6
KINDS = (RingMemory, GraphMemory)
HEADS = str(Path(__file__).with_name("heads.json"))
POLICIES = {
    **TABLE,
    "head-windows with static heads": partial(HeadWindows, heads=HEADS),
    "top-frames by head": partial(TopFrames, k=2, granularity="head"),
    "top-frames by token": partial(TopFrames, k=2, granularity="token"),
}
EACH = pytest.mark.parametrize("name", POLICIES)
# where the defaults do nothing in a window this small
KNOBS = {
    "top-frames": "k=1",
    "top-frames by head": "k=1",
    "top-frames by token": "k=1",
    "rolling-sink": "recent=1",
    "pooled": "blocks=2",
    "deep-sink": "budget=5,sink=3,recent=1",
    "merge": "threshold=0.3",
}


@pytest.fixture(scope="module")
def network():
    return tiny_network(CONFIG)


@dataclass(frozen=True, slots=True)
class Doubling(Policy):
    """The values of the newest past frame are doubled before each chunk."""

    name: ClassVar[str] = "doubling"
    layers: int = 2

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        return frames.all(layer)

    def opening(self, frames: Frames) -> None:
        for layer in range(self.layers if frames.past else 0):
            key, value = frames.stored(layer, [len(frames.past) - 1])
            frames.put(layer, [len(frames.past) - 1], KeyValue(key, 2 * value))


def policy_of(name: str) -> Policy:
    return choose(f"{name}:{KNOBS.get(name, '')}", POLICIES, "memory")


def plan_of(policy: Policy, batch: int = 2, frames: int = FRAMES) -> RunPlan:
    return RunPlan(suggested(PRESET, policy), frames, HEIGHT, WIDTH, batch, policy=policy)


def rollout_of(network, policy, kind=RingMemory, *, batch=2, context=CONTEXT, **options) -> Rollout:
    plan = plan_of(policy, batch)
    return Rollout.of(network, context, plan, WhiteNoise(0), memory=kind, **options)


@torch.no_grad()
def clip(rollout: Rollout) -> Tensor:
    return torch.cat(list(self_forcing().run(rollout)), 2)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@EACH
def test_sampling_and_training_remember_alike(network, name) -> None:
    ring, graph = (clip(rollout_of(network, policy_of(name), kind)) for kind in KINDS)
    assert apart(ring, graph) < 1e-4


@EACH
@pytest.mark.parametrize("previous", ["pending", "joint"])
def test_refine_passes_read_alike_in_sampling_and_training(network, name, previous) -> None:
    refiner = Refiner(merged(network, pairs_for(network)), ReflectiveCache("shared", previous))
    ring, graph = (
        clip(rollout_of(network, policy_of(name), kind, refiner=refiner)) for kind in KINDS
    )
    assert apart(ring, graph) < 1e-4
    assert apart(ring, clip(rollout_of(network, policy_of(name)))) > 1e-3


@EACH
def test_a_sample_does_not_depend_on_its_batch(network, name) -> None:
    two = clip(rollout_of(network, policy_of(name)))
    one = clip(rollout_of(network, policy_of(name), batch=1))
    assert apart(two[:1], one) < 1e-4


@EACH
def test_two_runs_do_not_share_what_they_remember(network, name) -> None:
    policy = policy_of(name)
    assert torch.equal(*(clip(rollout_of(network, policy)) for _ in range(2)))


@EACH
@pytest.mark.parametrize("transition", [Flush(1), Recache(6)])
def test_memories_agree_after_a_flush_and_a_recache(network, name, transition) -> None:
    prompts = Timeline((Scene(0, CONTEXT), Scene(15, -CONTEXT, transition)))
    ring, graph = (
        clip(rollout_of(network, policy_of(name), kind, context=prompts)) for kind in KINDS
    )
    assert apart(ring, graph) < 1e-4


@EACH
def test_a_policy_trains(network, name) -> None:
    rollout = rollout_of(network, policy_of(name), GraphMemory)
    self_rollout(rollout, 1).square().mean().backward()
    gradients = [each.grad for each in network.model.parameters() if each.grad is not None]
    assert gradients and all(each.isfinite().all() for each in gradients)
    network.model.zero_grad()


@EACH
def test_a_layer_that_is_recomputed_reads_the_same(network, name) -> None:
    gradients = []
    for checkpointing in (False, True):
        trained = replace(network, checkpointing=checkpointing)
        plan = replace(plan_of(policy_of(name), frames=15), preset=ONE_LEVEL)
        rollout = Rollout.of(trained, CONTEXT, plan, WhiteNoise(0), memory=GraphMemory)
        self_rollout(rollout, 0).square().mean().backward()
        gradients.append(network.model.blocks[1].self_attn.k.weight.grad.clone())
        network.model.zero_grad()
    assert apart(*gradients) < 1e-5 * gradients[0].abs().max()


def tensor_bytes(thing: object, seen: set[int]) -> int:
    """Count the bytes of the tensors that an object holds, without those seen before."""
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(thing, dict):
        return sum(tensor_bytes(each, seen) for each in thing.values())
    if isinstance(thing, list | tuple):
        return sum(tensor_bytes(each, seen) for each in thing)
    names = getattr(thing, "__dict__", None) or getattr(type(thing), "__slots__", ())
    if isinstance(thing, Policy | PlainStore):
        return sum(tensor_bytes(getattr(thing, name, None), seen) for name in names)
    return 0


@EACH
def test_the_bytes_of_a_policy_are_counted(network, name) -> None:
    policy = policy_of(name)
    plan = plan_of(policy).memory(CONFIG, torch.float32)
    rollout = rollout_of(network, policy)
    assert rollout.memory.nbytes == plan.nbytes
    clip(rollout)
    memory = rollout.memory
    held = tensor_bytes([memory.means, memory.policy], set())
    window = MemoryPlan.of(
        CONFIG, (2, 16, FRAMES, HEIGHT, WIDTH), window_frames=plan.window_frames,
        sink_frames=plan.sink_frames, keys=plan.keys, policy=Window(),
    )  # fmt: skip
    assert held == plan.nbytes - window.nbytes
    memory.free()
    assert not tensor_bytes([memory.means, memory.policy], set())


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"window"}))
def test_a_policy_reads_something_else_than_the_window(network, name) -> None:
    policy = policy_of(name)
    window = RunPlan(suggested(PRESET, policy), FRAMES, HEIGHT, WIDTH, 2, policy=Window())
    plain = clip(Rollout.of(network, CONTEXT, window, WhiteNoise(0)))
    assert apart(clip(rollout_of(network, policy)), plain) > 1e-3


def test_a_policy_may_replace_frames_before_a_chunk(network) -> None:
    ring, graph = (clip(rollout_of(network, Doubling(), kind)) for kind in KINDS)
    assert apart(ring, graph) < 1e-4
    assert apart(ring, clip(rollout_of(network, Window()))) > 1e-3


def test_keys_before_rope_are_stored_where_a_policy_needs_them(network) -> None:
    class Raw(Window):
        raw = True

    assert plan_of(Raw()).memory(CONFIG, torch.float32).keys == "raw"
    with pytest.raises(ValueError, match="raw"):
        MemoryPlan.of(CONFIG, (1, 16, 9, 4, 6), policy=Raw(), keys="rotated")
    assert apart(clip(rollout_of(network, Raw())), clip(rollout_of(network, Window()))) < 1e-5
