"""`deep-sink`: which tokens a chunk reads, where, and what outlives its frame."""

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.policies import DeepSink, Window
from autorefiner.refiner.memory.positions import SinkAdjacent
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan, suggested
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.training.self_rollout import self_rollout

from tiny import TINY, tiny_network

SF = PRESETS["self-forcing"].changed(levels=(1000, 500))
WINDOW_9 = SF.changed(window=9, sink=3)
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
KINDS = pytest.mark.parametrize("kind", [RingMemory, GraphMemory])

# One head, two tokens a frame; a window of 2 sink frames and 6 others, read in chunks of one frame.
# A frame of tokens may be chosen, between the sink and the last frame.
SMALL = MemoryPlan(
    layers=1, heads=1, head_dim=12, batch=2, height=1, width=2, window_frames=8, sink_frames=2,
    keys="raw", positions=SinkAdjacent(), policy=DeepSink(budget=4, sink=2, recent=1),
)  # fmt: skip
# Product of each token's key with the query. The second sample has them negated.
SCORES = torch.tensor([0, 0, 0, 0, 5, 1, 2, 9, 3, 4, 6, 7, 0.5, 0.5, 1, 1, 8, 2] + 6 * [0])
SINK = [0, 1, 2, 3]


def run(network, policy, preset, frames: int = 24) -> Tensor:
    plan = RunPlan(suggested(preset, policy), frames, 4, 6, policy=policy)
    return torch.cat(list(sample(network, CONTEXT, plan)), 2)


def tokens_of(frame: int) -> tuple[Tensor, Tensor]:
    """Return raw keys and values of a frame; a value is the token's number in the video."""
    key = torch.randn(2, 2, 1, 12, generator=torch.Generator().manual_seed(frame))
    score = SCORES.view(-1, 2)[frame]
    key[:, :, 0, 0] = torch.stack((score, -score))
    value = torch.full((2, 2, 1, 12), 2.0 * frame)
    value[:, 1] += 1
    return key, value


def chunk_of(memory, frame: int):
    """Return what the chunk of one frame reads, at its first pass, and commit it."""
    key, value = tokens_of(frame)
    query = torch.zeros(2, 2, 1, 12)
    query[..., 0] = 0.5
    view = memory.view((frame,))
    table = SMALL.table(view.positions, like=key)
    read = view.extend(0, key, value, table, query)
    # the choice of the first pass holds in the next, whose queries would choose the opposite
    assert torch.equal(view.extend(0, key, value, table, -query).value, read.value)
    memory.commit()
    return read, view.positions[0]


def key_at(token: int, position: int) -> Tensor:
    """Return the key of a token of the video, by number, rotated to a temporal position."""
    raw_key, _ = tokens_of(token // 2)
    return SMALL.rotate(raw_key, [position])[:, token % 2]


def numbers(value: Tensor) -> list[list[int]]:
    return value[:, :, 0, 0].int().tolist()


@KINDS
def test_chosen_tokens_outlive_their_frames_and_lie_between_sink_and_recent(kind) -> None:
    memory = kind(SMALL)
    # by chunk, the two tokens of each sample; token 2f + p is at place p of frame f
    expected = {
        5: ([4, 7], [5, 6]),  # of frames 2 and 3
        6: ([4, 7], [5, 6]),  # and of frame 4, no better
        7: ([7, 11], [5, 6]),  # and of frame 5, whose 7 beats the 5 of token 4
        8: ([7, 11], [12, 13]),  # frame 6 of the second sample: twice -0.5
        9: ([7, 11], [12, 13]),  # frame 3 has left the ring
        10: ([7, 16], [12, 13]),
        11: ([7, 16], [18, 19]),  # frame 9 scores 0
    }
    for frame in range(12):
        read, position = chunk_of(memory, frame)
        if frame < 5:
            assert numbers(read.value)[0] == list(range(2 * frame + 2))
            continue
        recent = [2 * frame - 2, 2 * frame - 1, 2 * frame, 2 * frame + 1]
        assert numbers(read.value) == [[*SINK, *top, *recent] for top in expected[frame]], frame
        for index, ids in enumerate(numbers(read.value)):
            placed = [position - 4 + rank // 2 for rank in range(10)]
            keys = [key_at(token, place)[index] for token, place in zip(ids, placed, strict=True)]
            assert (read.key[index] - torch.stack(keys)).abs().max() < 1e-6


@KINDS
def test_nothing_of_before_a_flush_is_read(kind) -> None:
    memory = kind(SMALL)
    for frame in range(8):
        chunk_of(memory, frame)
    memory.flush(keep_last=1)
    for frame in range(8, 12):
        read, _ = chunk_of(memory, frame)
    assert numbers(read.value)[0] == [*SINK, 16, 17, 20, 21, 22, 23]


def test_a_budget_of_all_held_frames_is_the_window() -> None:
    network = tiny_network()
    placed = suggested(WINDOW_9, DeepSink())  # sink-adjacent, as deep-sink suggests
    window = run(network, Window(), placed)
    assert torch.equal(run(network, DeepSink(budget=6, sink=3, recent=1), placed), window)
    chosen = run(network, DeepSink(budget=5, sink=3, recent=1), placed)
    assert torch.equal(chosen[:, :, :6], window[:, :, :6])
    assert (chosen[:, :, 6:9] - window[:, :, 6:9]).abs().max() > 1e-4


def test_a_short_clip_has_the_window_of_the_policy() -> None:
    plan = RunPlan(suggested(SF, DeepSink()), 30, 4, 6, policy=DeepSink())
    memory = plan.memory(TINY, torch.float32)
    assert (memory.window_frames, memory.sink_frames, memory.positions.name) == (
        21, 10, "sink-adjacent",
    )  # fmt: skip


def gradients_of(checkpointing: bool) -> list[Tensor]:
    network = tiny_network(checkpointing=checkpointing)
    policy = DeepSink(budget=5, sink=3, recent=1)
    plan = RunPlan(suggested(WINDOW_9, policy), 12, 4, 6, policy=policy)
    rollout = Rollout.of(network, CONTEXT, plan, WhiteNoise(0), memory=GraphMemory)
    self_rollout(rollout, 1).square().mean().backward()
    return [each.grad for each in network.model.blocks.parameters() if each.grad is not None]


def test_a_recomputed_layer_reads_what_its_chunk_chose() -> None:
    pairs = zip(gradients_of(True), gradients_of(False), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("knobs", [dict(budget=14), dict(sink=-1), dict(recent=-1)])
def test_knobs_that_leave_no_tokens_to_choose_are_refused(knobs) -> None:
    with pytest.raises(ValueError, match="budget"):
        DeepSink(**knobs)


def test_a_window_that_drops_the_sink_is_refused() -> None:
    policy = DeepSink(budget=8, sink=4, recent=1)
    with pytest.raises(ValueError, match="window keeps 3"):
        RunPlan(WINDOW_9, 24, 4, 6, policy=policy).memory(TINY, torch.float32)
    RunPlan(SF, 24, 4, 6, policy=policy).memory(TINY, torch.float32)  # drops nothing
