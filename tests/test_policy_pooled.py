"""pooled: frames that left the window are averaged in blocks, which are read beside it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.policies import Pooled, Window
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.training.self_rollout import self_rollout
from autorefiner.refiner.wan.causal import KeyValue

from tiny import tiny_network
from tiny_memory import KINDS, feed, plan_of, random_frames, rotated, same

PRESET = PRESETS["self-forcing"].changed(levels=(1000, 500), window=6, sink=1)
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))


def clip(policy, positions: str = "sink-adjacent") -> Tensor:
    plan = RunPlan(PRESET.changed(positions=positions), 18, 4, 6, policy=policy)
    return torch.cat(list(sample(tiny_network(), CONTEXT, plan)), 2)


@pytest.mark.parametrize("positions", ["sink-adjacent", "relative"])
def test_a_pool_of_one_is_the_window(positions) -> None:
    assert torch.equal(clip(Pooled(pool=1), positions), clip(Window(), positions))
    pooled = [clip(Pooled(pool=pool, blocks=2), positions) for pool in (2, 3)]
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-3)


@pytest.mark.parametrize(
    ("sink", "early", "late"), [(0, [(0, 1)], [(10, 11), (12, 13)]), (1, [], [(9, 10), (11, 12)])]
)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_read_between_sink_and_window(kind, sink, early, late) -> None:
    plan = plan_of(Pooled(pool=2, blocks=2), frames=24, window=sink + 4, sink=sink)
    frames = random_frames(plan, 24)
    reads = feed(kind(plan), frames, range(18), 2)
    for start, blocks in (4, early), (16, late):  # 13 waits for another one

        def read(part: Tensor, start: int = start, blocks: list = blocks) -> Tensor:
            averages = [part[:, list(block)].mean(1, keepdim=True) for block in blocks]
            return torch.cat((part[:, :sink], *averages, part[:, start - 2 : start + 2]), 1)

        positions = range(start - 2 - sink - len(blocks), start + 2)
        key = rotated(plan, read(frames.key), positions)
        assert same(reads[start // 2], KeyValue(key, read(frames.value)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flush_forgets_the_blocks(kind) -> None:
    plan = plan_of(Pooled(pool=2), frames=12, window=5, sink=1)
    frames, fresh, flushed = random_frames(plan, 12), kind(plan), kind(plan)
    feed(flushed, frames, range(12), 2)
    flushed.flush(0, keep_sink=False)
    pairs = zip(*(feed(each, frames, range(12), 2) for each in (fresh, flushed)), strict=True)
    assert all(same(one, other) for one, other in pairs)


def test_a_recomputed_layer_reads_the_blocks_of_its_chunk() -> None:
    network, gradients = tiny_network(), []
    plan = RunPlan(PRESET, 12, 4, 6, policy=Pooled(pool=2, blocks=2))
    for checkpointing in (False, True):
        rollout = Rollout.of(
            replace(network, checkpointing=checkpointing), CONTEXT, plan, WhiteNoise(0),
            memory=GraphMemory,
        )  # fmt: skip
        self_rollout(rollout, 1).square().mean().backward()
        gradients.append(network.model.blocks[1].self_attn.k.weight.grad.clone())
        network.model.zero_grad()
    assert torch.allclose(*gradients, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("knobs", [{"pool": 0}, {"blocks": 0}])
def test_it_refuses_blocks_without_frames(knobs) -> None:
    with pytest.raises(ValueError, match="pool"):
        Pooled(**knobs)
