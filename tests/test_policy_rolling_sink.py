"""rolling-sink: copies of the first frames take the place of later ones, back and forth."""

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.memory.policies import RollingSink, Window
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import KeyValue

from tiny import tiny_network
from tiny_memory import KINDS, feed, plan_of, random_frames, rotated, same

CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))


def clip(policy, window: int, sink: int = 0) -> Tensor:
    preset = PRESETS["self-forcing"].changed(levels=(1000, 500), window=window, sink=sink)
    plan = RunPlan(preset, 18, 4, 6, policy=policy)
    return torch.cat(list(sample(tiny_network(), CONTEXT, plan)), 2)


@pytest.mark.parametrize("sink", [0, 1])
def test_inside_the_first_window_it_is_full_history(sink) -> None:
    rolling, window, full = clip(RollingSink(), 9, sink), clip(Window(), 9, sink), clip(None, -1)
    assert torch.equal(rolling[:, :, :9], full[:, :, :9])
    assert torch.equal(rolling[:, :, :12], window[:, :, :12])  # still only the first frames are old
    assert not torch.allclose(rolling[:, :, 12:15], window[:, :, 12:15], atol=1e-3)
    assert torch.equal(clip(RollingSink(), -1), full)


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_turns_at_both_ends_of_the_first_window(kind) -> None:
    plan = plan_of(RollingSink(), frames=30, window=9)  # a walk over the frames 0 to 5
    frames = random_frames(plan, 30)
    reads = feed(kind(plan), frames, range(30), 3)
    for start, past in [
        (9, [3, 4, 5, 6, 7, 8]),
        (12, [5, 4, 3, 9, 10, 11]),
        (15, [2, 1, 0, 12, 13, 14]),
        (18, [0, 1, 2, 15, 16, 17]),
        (21, [3, 4, 5, 18, 19, 20]),
        (24, [5, 4, 3, 21, 22, 23]),
    ]:
        which = [*past, start, start + 1, start + 2]
        key = rotated(plan, frames.key[:, which], range(start - 6, start + 3))
        assert same(reads[start // 3], KeyValue(key, frames.value[:, which]))


@pytest.mark.parametrize("kind", KINDS)
def test_more_recent_frames_make_a_shorter_walk(kind) -> None:
    plan = plan_of(RollingSink(recent=5), frames=21, window=9, sink=1)
    frames = random_frames(plan, 21)
    seen = feed(kind(plan), frames, range(21), 1)[-1]
    # the sink, 2 and 1 for 13 and 14 as a fourth turn over 0 to 3 goes back, the last five, itself
    which = [0, 2, 1, 15, 16, 17, 18, 19, 20]
    key = rotated(plan, frames.key[:, which], (0, *range(13, 21)))
    assert same(seen, KeyValue(key, frames.value[:, which]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_that_leaves_with_the_next_chunk_is_copied_all_the_same(kind) -> None:
    plan = plan_of(RollingSink(recent=1), frames=12, window=5)  # a chunk reads two past frames
    frames, which = random_frames(plan, 12), [0, 8, 9, 10, 11]
    seen = feed(kind(plan), frames, range(12), 3)[-1]
    key = rotated(plan, frames.key[:, which], range(7, 12))
    assert same(seen, KeyValue(key, frames.value[:, which]))


def test_a_frame_is_replaced_once() -> None:
    plan = plan_of(RollingSink(), frames=30, window=12)
    memory, counts = RingMemory(plan), []
    replace = memory.policy.replace
    memory.policy.replace = lambda frames, ranks, slots: (
        counts.append(len(ranks)), replace(frames, ranks, slots)
    )  # fmt: skip
    feed(memory, random_frames(plan, 30), range(30), 3)
    assert counts == [3] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_flush_starts_another_walk(kind) -> None:
    plan = plan_of(RollingSink(), frames=30, window=9)
    frames, fresh, flushed = random_frames(plan, 30), kind(plan), kind(plan)
    feed(flushed, frames, range(21), 3)
    flushed.flush(0)
    pairs = zip(*(feed(each, frames, range(21), 3) for each in (fresh, flushed)), strict=True)
    assert all(same(one, other) for one, other in pairs)


@pytest.mark.parametrize("recent", [0, 6])
def test_recent_frames_must_fit_beside_the_sink(recent) -> None:
    with pytest.raises(ValueError, match="recent"):
        plan_of(RollingSink(recent=recent), frames=21, window=9, sink=3)
