"""Positions by name: where each frame stands, and frequencies scaled for longer videos."""

from dataclasses import replace
from math import pi

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.choices import choose
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.positions import POSITIONS, Absolute, Flex, SinkAdjacent
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.outputs import differences
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.samplers import self_forcing
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.rope import axis_pairs, frequencies_of, rotation_table

from tiny import TINY, tiny_network
from tiny_command import command, parse, write_files
from tiny_refiner import pairs_for

PRESET = PRESETS["self-forcing"].changed(levels=(1000, 500), window=7, sink=1)
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
LIKE = torch.zeros(1)


@torch.no_grad()
def clip(positions: str, memory=RingMemory, previous: str | None = None, keys=None) -> Tensor:
    network = tiny_network()
    cache = ReflectiveCache("shared", previous or "none")
    refiner = Refiner(merged(network, pairs_for(network)), cache) if previous else None
    plan = RunPlan(PRESET.changed(positions=positions), 11, 4, 6, keys=keys)
    rollout = Rollout.of(network, CONTEXT, plan, WhiteNoise(0), memory=memory, refiner=refiner)
    return torch.cat(list(self_forcing().run(rollout)), 2)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("keys", ["rotated", "raw"])
@pytest.mark.parametrize("previous", [None, "pending", "joint"])
def test_flex_of_scale_1_is_absolute(keys, previous) -> None:
    flex = clip("flex:scale=1", keys=keys, previous=previous)
    assert torch.equal(flex, clip("absolute", keys=keys, previous=previous))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("previous", [None, "pending", "joint"])
def test_positions_hold_in_training_and_in_refine_passes(positions, previous) -> None:
    ring, graph = (clip(positions, kind, previous) for kind in (RingMemory, GraphMemory))
    assert apart(ring, graph) < 1e-4
    if positions != "absolute":
        assert apart(ring, clip("absolute", previous=previous)) > 1e-4


@pytest.mark.parametrize("previous", [None, "pending", "joint"])
def test_flex_rotates_raw_keys_as_it_does_others(previous) -> None:
    raw, rotated = (clip("flex", previous=previous, keys=keys) for keys in ("raw", "rotated"))
    assert apart(raw, rotated) < 1e-4


def test_flex_scales_slow_frequencies_alone() -> None:
    own = frequencies_of(22)
    turns = [21 * frequency / (2 * pi) for frequency in own]
    scaled = Flex(scale=0.25, lo=0.5, hi=2).frequencies(128)
    ratios = [new / old for new, old in zip(scaled, own, strict=True)]
    assert [ratio for ratio, turn in zip(ratios, turns, strict=True) if turn >= 2] == [1, 1]
    slow = [ratio for ratio, turn in zip(ratios, turns, strict=True) if turn <= 0.5]
    assert slow == pytest.approx([0.25] * len(slow), rel=1e-15) and len(slow) > 10
    middle = (turns[3] - 0.5) / 1.5
    assert ratios[3] == pytest.approx(middle + (1 - middle) * 0.25, rel=1e-15)


def test_frequencies_change_the_temporal_pairs_alone() -> None:
    own = rotation_table((0, 40), 2, 3, 128, LIKE)
    half = tuple(frequency / 2 for frequency in frequencies_of(22))
    scaled = rotation_table((0, 40), 2, 3, 128, LIKE, half)
    temporal = axis_pairs(128)[0]
    assert torch.equal(own[:, temporal:], scaled[:, temporal:])
    assert torch.equal(scaled, rotation_table((0, 20), 2, 3, 128, LIKE))


@pytest.mark.parametrize("knobs", ["scale=0", "scale=1.5", "lo=4", "lo=-1", "trained=0"])
def test_flex_refuses_knobs_out_of_range(knobs) -> None:
    with pytest.raises(ValueError, match="flex"):
        choose(f"flex:{knobs}", POSITIONS, "positions")


def test_the_sink_stands_before_the_oldest_recent_frame() -> None:
    placement = SinkAdjacent().place((0, 1, 2, 30, 31), (32, 33), 3)
    assert placement == ((27, 28, 29, 30, 31), (32, 33))
    near = (0, 1, 2, 3), (4, 5), 2
    assert SinkAdjacent().place(*near) == Absolute().place(*near)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def job_of(files, tmp_path, *extra: str):
    return prepare(parse(command(files, tmp_path / "a.mp4", *extra)))


def test_generate_takes_positions(files, tmp_path) -> None:
    plain, window = job_of(files, tmp_path), ["--window", "6", "--sink", "1"]
    adjacent = job_of(files, tmp_path, *window, "--positions", "sink-adjacent")
    flex = job_of(files, tmp_path, "--positions", "flex:scale=0.5")
    memories = [job.plan.memory(TINY, torch.float32) for job in (plain, adjacent, flex)]
    assert [memory.keys for memory in memories] == ["rotated", "raw", "rotated"]
    assert [memory.positions for memory in memories] == [Absolute(), SinkAdjacent(), Flex(0.5)]
    assert "positions" not in plain.metadata and not notes(adjacent)
    changes = differences(plain.metadata, flex.metadata, 0)
    assert changes == "positions the preset's (now flex:scale=0.5)"
    alone = job_of(files, tmp_path, "--positions", "sink-adjacent")
    assert any("sink" in note for note in notes(alone))


@pytest.mark.parametrize(
    ("positions", "message"),
    [("elsewhere", "sink-adjacent"), ("flex:scale=2", "scale"), ("relative:k=1", "no knob")],
)
def test_unknown_positions_are_refused_before_loading(files, tmp_path, positions, message) -> None:
    with pytest.raises(ValueError, match=message):
        job_of(files, tmp_path, "--positions", positions)


def test_moving_positions_refuse_rotated_keys() -> None:
    plan = RunPlan(PRESET.changed(positions="sink-adjacent"), 11, 4, 6, keys="rotated")
    with pytest.raises(ValueError, match="raw"):
        plan.memory(TINY, torch.float32)
    assert replace(plan, keys=None).memory(TINY, torch.float32).keys == "raw"
