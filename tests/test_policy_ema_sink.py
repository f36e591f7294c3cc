"""ema-sink: frames that leave the window are averaged into the sink."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autorefiner.nodes.run import plan_run
from autorefiner.refiner.commands.generate import summary
from autorefiner.refiner.job import prepare
from autorefiner.refiner.memory.policies import EmaSink, Window
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.request import GenerateOptions
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import KeyValue

from tiny import tiny_network
from tiny_memory import KINDS, feed, plan_of, random_frames, rotated, same

PRESET = PRESETS["self-forcing"].changed(levels=(1000, 500), window=9, sink=3)
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))


def clip(policy, positions: str, dtype=torch.float32) -> Tensor:
    preset = PRESET.changed(positions=positions)
    plan = RunPlan(preset, 21, 4, 6, keys="raw", policy=policy)
    return torch.cat(list(sample(tiny_network(dtype=dtype), CONTEXT, plan)), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["sink-adjacent", "relative"])
def test_a_sink_that_is_retained_is_the_windows(positions, dtype) -> None:
    static = clip(Window(), positions, dtype)
    assert torch.equal(clip(EmaSink(retain=1), positions, dtype), static)
    assert not torch.equal(clip(EmaSink(retain=0.9), positions, dtype), static)


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_frames_are_averaged_into_the_sink_frame_of_their_place(kind) -> None:
    plan = plan_of(EmaSink(retain=0.75), frames=12, window=6, sink=2)
    memory, frames = kind(plan), random_frames(plan, 12)
    *_, seen = feed(memory, frames, range(10), 2)  # 2, 3, 4 and 5 have left, 6 and 7 are read

    def averaged(part: Tensor) -> Tensor:
        first = 0.75 * part[:, :2] + 0.25 * part[:, 2:4]
        return torch.cat((0.75 * first + 0.25 * part[:, 4:6], part[:, 6:10]), 1)

    key = rotated(plan, averaged(frames.key), range(4, 10))
    assert same(seen, KeyValue(key, averaged(frames.value)))


def test_averages_are_not_rounded_to_the_memorys_dtype() -> None:
    plan = plan_of(EmaSink(), frames=400, window=3, sink=1, dtype=torch.bfloat16)
    memory, shape = RingMemory(plan), random_frames(plan, 1).key.shape
    frames = KeyValue(*(torch.ones(1, 400, *shape[2:]).to(plan.dtype) for _ in range(2)))
    frames.value[:, 0] = 0
    *_, seen = feed(memory, frames, range(300), 1)
    assert float(seen.value[0, 0].mean()) == pytest.approx(1 - 0.99**297, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flush_of_the_sink_starts_the_average_anew(kind) -> None:
    plan = plan_of(EmaSink(retain=0.5), frames=12, window=6, sink=2)
    frames = random_frames(plan, 12)
    fresh, memory, flushed = kind(plan), kind(plan), kind(plan)
    for each in (memory, flushed):
        feed(each, frames, range(12), 3)
    memory.flush(0)
    flushed.flush(0, keep_sink=False)
    seen, again, longer = (
        feed(each, frames, range(12), 3)[-1] for each in (fresh, flushed, memory)
    )
    assert same(seen, again)
    assert not same(seen, longer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flush_that_spares_the_sink_spares_the_average(kind) -> None:
    plan = plan_of(EmaSink(retain=0.5), frames=12, window=6, sink=2)
    memory, frames = kind(plan), random_frames(plan, 12)
    feed(memory, frames, range(12), 3)
    memory.flush(0)
    average = frames.value[:, :2].clone()
    for left in range(2, 9):  # 8 was the last to leave, after the last chunk was read
        average[:, left % 2].lerp_(frames.value[:, left], 0.5)
    (seen,) = feed(memory, frames, range(3), 3)
    assert torch.allclose(seen.value[:, :2], average, atol=1e-5)


@pytest.mark.parametrize("retain", [-0.1, 1.1])
def test_it_refuses_a_share_outside_0_to_1(retain) -> None:
    with pytest.raises(ValueError, match="retain"):
        EmaSink(retain=retain)


def test_it_needs_a_sink_only_where_frames_leave() -> None:
    with pytest.raises(ValueError, match="sink"):
        plan_of(EmaSink(), frames=21, window=12)
    short = plan_of(EmaSink(), frames=12, window=12)
    assert short.nbytes == plan_of(Window(), frames=12, window=12).nbytes


def test_the_preset_of_reward_forcing_averages_in_every_host(tmp_path) -> None:
    preset = PRESETS["reward-forcing"]
    assert RunPlan(preset, 21, 4, 6).policy == EmaSink()
    assert plan_run(preset, (1, 21, 4, 6), None).policy == EmaSink()
    options = GenerateOptions(
        "random-tiny", tmp_path / "a.mp4", preset="reward-forcing", width=32, height=32
    )
    job = prepare(options)
    assert "sink 3, ema-sink" in summary(job)
    assert (job.plan.policy, job.metadata["memory"]) == (EmaSink(), "ema-sink")
    job = prepare(replace(options, memory="window"))
    assert "ema-sink" not in summary(job)
    assert (job.plan.policy, "memory" in job.metadata) == (Window(), False)
