"""Samplers, memory policies, positions, timelines: each at its neutral value is the run without it,
bit for bit."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.policies import POLICIES, TopFrames, Window
from autorefiner.refiner.memory.policy import Frames, Policy
from autorefiner.refiner.memory.positions import Absolute, Cut, Relative, SinkAdjacent
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import SAMPLERS, hiar, self_forcing
from autorefiner.refiner.schedule import PRESETS, Chunk, plan_chunks
from autorefiner.refiner.timeline import Flush, Keep, Recache, Scene, Timeline
from autorefiner.refiner.training.self_rollout import self_rollout
from autorefiner.refiner.wan.causal import KeyValue, Seen
from autorefiner.refiner.wan.transformer import WanConfig

from tiny import tiny_network
from tiny_refiner import pairs_for

TWO_HEADS = WanConfig(dim=128, num_heads=2, ffn_dim=128, num_layers=2, text_dim=32, text_len=8)
SF = PRESETS["self-forcing"]
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
FRAMES, HEIGHT, WIDTH = 15, 4, 6
KINDS = (RingMemory, GraphMemory)


@pytest.fixture(scope="module")
def network():
    return tiny_network(TWO_HEADS)


def run(
    network, policy=None, preset=SF, batch=2, context=CONTEXT, keys=None, frames=FRAMES, **options
) -> Tensor:
    plan = RunPlan(preset, frames, HEIGHT, WIDTH, batch, keys=keys, policy=policy or Window())
    return torch.cat(list(sample(network, context, plan, **options)), 2)


def rollout_of(network, kind, policy=None, preset=SF, refiner=None, keys=None) -> Rollout:
    plan = RunPlan(preset, FRAMES, HEIGHT, WIDTH, 2, keys=keys, policy=policy or Window())
    return Rollout.of(network, CONTEXT, plan, WhiteNoise(0), memory=kind, refiner=refiner)


@dataclass(frozen=True, slots=True)
class HeadWindows(Policy):
    """The first heads see the last frames alone."""

    name: ClassVar[str] = "head-windows"

    near: int = 1
    recent: int = 3
    bias: bool = False  # hide what the near heads do not see instead of leaving it out

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue | list[Seen]:
        whole, count = frames.all(layer), len(frames.past)
        if count <= self.recent:
            return whole
        first, rest = slice(0, self.near), slice(self.near, None)
        far = Seen(rest, whole.key[:, :, rest], whole.value[:, :, rest])
        if self.bias:
            tokens = whole.key.shape[1] // (count + frames.chunk)
            bias = torch.zeros(1, 1, 1, whole.key.shape[1])
            bias[..., : (count - self.recent) * tokens] = float("-inf")
            return [Seen(first, whole.key[:, :, first], whole.value[:, :, first], bias), far]
        ranks = torch.arange(count - self.recent, count).expand(len(raw_query_BNHD), -1)
        near = frames.take(layer, ranks)
        return [Seen(first, near.key[:, :, first], near.value[:, :, first]), far]


@dataclass(frozen=True, slots=True)
class Witness(Policy):
    """Records the frames that leave, and their values."""

    name: ClassVar[str] = "witness"
    means: ClassVar[bool] = True

    seen: list = field(default_factory=list)

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        return frames.all(layer)

    def evicting(self, frames: Frames) -> None:
        ranks = torch.arange(len(frames.past)).expand(2, -1)
        whole, chosen = frames.all(1), frames.take(1, ranks)
        assert all(torch.equal(a, b) for a, b in zip(whole, chosen, strict=True))
        self.seen.append(([held.frame for held in frames.past], whole.value, frames.means(1)))


@pytest.mark.parametrize("keys", ["rotated", "raw"])
def test_as_many_retrieved_frames_as_there_are_is_full_history(network, keys) -> None:
    dense = run(network, keys=keys)
    assert torch.equal(run(network, TopFrames(k=FRAMES), keys=keys), dense)
    assert torch.equal(
        run(network, TopFrames(k=8, sink=1, recent=3), keys=keys), dense
    )  # 12 past frames at most
    fewer = run(network, TopFrames(k=7, sink=1, recent=3), keys=keys)
    assert torch.equal(fewer[:, :, :12], dense[:, :, :12])
    assert not torch.equal(fewer, dense)


@pytest.mark.parametrize("keys", ["rotated", "raw"])
def test_each_sample_retrieves_for_itself(network, keys) -> None:
    both = run(network, TopFrames(k=2), keys=keys)
    assert (both[:1] - run(network, TopFrames(k=2), batch=1, keys=keys)).abs().max() < 1e-4


def test_the_best_frames_are_those_whose_mean_key_answers_the_mean_query() -> None:
    class Past:
        past, chunk = [None] * 6, 1

        def means(self, layer):
            keys = torch.zeros(2, 6, 1, 4)
            keys[0, :, 0, 0] = torch.tensor([9.0, 1, 4, 2, 3, 9])
            keys[1, :, 0, 0] = torch.tensor([9.0, 5, 1, 2, 7, 9])
            return keys

        def take(self, layer, ranks):
            return ranks.tolist()

    query = torch.tensor([1.0, 0, 0, 0]).expand(2, 3, 1, 4)
    assert TopFrames(k=2, sink=1, recent=1).read(0, query, Past()) == [[0, 2, 4, 5], [0, 1, 4, 5]]


@pytest.mark.parametrize("previous", ["pending", "joint", "none"])
@pytest.mark.parametrize("history", ["shared", "none"])
@pytest.mark.parametrize("keys", ["rotated", "raw"])
@torch.no_grad()
def test_a_policy_holds_for_refine_passes_and_in_training(network, previous, history, keys) -> None:
    refiner = Refiner(merged(network, pairs_for(network)), ReflectiveCache(history, previous))
    ring, graph = (
        torch.cat(
            list(self_forcing().run(rollout_of(network, kind, TopFrames(k=2), SF, refiner, keys))),
            2,
        )
        for kind in KINDS
    )
    assert (ring - graph).abs().max() < 1e-4
    dense = run(network, TopFrames(k=FRAMES), keys=keys, refiner=refiner)
    assert torch.equal(dense, run(network, keys=keys, refiner=refiner))
    assert not torch.equal(dense, ring)


def test_a_policy_trains(network) -> None:
    rollout = rollout_of(network, GraphMemory, TopFrames(k=2))
    clip = self_rollout(rollout, 1)
    clip.square().mean().backward()
    gradient = network.model.blocks[0].self_attn.q.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    network.model.zero_grad()
    with torch.no_grad():
        rolled = self_rollout(rollout_of(network, RingMemory, TopFrames(k=2)), 1)
    assert (clip - rolled).abs().max() < 1e-4


def test_heads_may_see_different_frames(network) -> None:
    dense = run(network)
    assert (run(network, HeadWindows(recent=FRAMES)) - dense).abs().max() == 0
    near = run(network, HeadWindows(recent=3))
    assert (near - dense).abs().max() > 1e-3
    assert (run(network, HeadWindows(recent=3, bias=True)) - near).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_frames_that_a_chunk_overwrites_are_shown_once(network, kind) -> None:
    witness = Witness()
    list(self_forcing().run(rollout_of(network, kind, witness, SF.changed(window=7, sink=1))))
    assert [frame for frames, _, _ in witness.seen for frame in frames] == [*range(1, 9)]
    assert all(value.shape[1] == len(frames) * 6 for frames, value, _ in witness.seen)
    assert all(mean.shape[1] == len(frames) for frames, _, mean in witness.seen)


@torch.no_grad()
def test_both_memories_show_the_same_leaving_frames(network) -> None:
    seen = []
    for kind in KINDS:
        witness = Witness()
        list(self_forcing().run(rollout_of(network, kind, witness, SF.changed(window=7, sink=1))))
        seen.append(witness.seen)
    for (_, value, mean), (_, value_too, mean_too) in zip(*seen, strict=True):
        assert (value - value_too).abs().max() < 1e-5
        assert (mean - mean_too).abs().max() < 1e-5


@pytest.mark.parametrize("policy", [Window(), TopFrames()])
def test_the_bytes_of_a_policy_are_counted(policy) -> None:
    plan = MemoryPlan.of(TWO_HEADS, (2, 16, FRAMES, HEIGHT, WIDTH), policy=policy, spare_frames=3)
    assert RingMemory(plan).nbytes == plan.nbytes
    means = 2 * 2 * 18 * 128 * 4 if policy.means else 0  # layers, batch, slots, width, bytes
    assert plan.nbytes == 2 * 2 * 2 * 18 * 6 * 128 * 4 + means
    assert plan.read_bytes == (0 if isinstance(policy, Window) else 2 * 2 * 18 * 6 * 128 * 4)


def test_every_policy_runs_with_every_sampler(network) -> None:
    for make in POLICIES.values():
        for method in SAMPLERS.values():
            assert run(network, make(), frames=7, batch=1, method=method()).isfinite().all()


def test_a_level_of_its_own_cache_is_self_forcing(network) -> None:
    one = SF.changed(levels=(1000,))
    assert torch.equal(run(network, preset=one, method=hiar()), run(network, preset=one))
    assert not torch.equal(run(network, method=hiar()), run(network))


@torch.no_grad()
def test_hiar_sees_each_chunk_as_it_is_one_level_further(network) -> None:
    """By hand, without caches: chunk 1 at a level sees chunk 0 renoised to the level below, written
    at its timestep."""
    preset = SF.changed(levels=(1000, 500))
    chunks = plan_chunks(preset, 6)[1]
    high, low = chunks[0].levels
    plan = RunPlan(preset, 6, HEIGHT, WIDTH)
    rollout = Rollout.of(network, CONTEXT, plan, WhiteNoise(0))
    x = [rollout.draw(chunk, high) for chunk in chunks]
    expected = []
    for level, below in ((high, low), (low, None)):
        memory = GraphMemory(plan.memory(TWO_HEADS, torch.float32))
        rollout.memory = memory
        for place, chunk in enumerate(chunks):
            x0 = rollout.predict(x[place], level, chunk)
            x[place] = rollout.renoise(x0, below, chunk) if below else x0
            network(
                x[place],
                torch.full((1, 1), below.t if below else 0.0),
                rollout.text,
                memory.view(chunk.frames),
            )
            memory.commit()
    expected = torch.cat(x, 2)
    assert (
        run(network, preset=preset, frames=6, batch=1, method=hiar()) - expected
    ).abs().max() < 1e-5


def test_hiar_is_refused_where_it_cannot_run(network) -> None:
    with pytest.raises(ValueError, match="first chunk"):
        run(network, preset=PRESETS["causal-forcing-2step"], method=hiar())
    two = Timeline((Scene(0, CONTEXT), Scene(3, -CONTEXT)))
    with pytest.raises(ValueError, match="prompt"):
        run(network, context=two, method=hiar())


def test_the_bytes_of_named_caches_are_counted(network) -> None:
    plan = RunPlan(SF, 6, HEIGHT, WIDTH)
    caches = hiar().caches(plan.chunks[0].levels)
    assert len(caches) == 3
    rollout = Rollout.of(network, CONTEXT, plan, WhiteNoise(0), caches=caches)
    held = rollout.memory.nbytes + sum(memory.nbytes for memory in rollout.caches.values())
    assert plan.memory_bytes(TWO_HEADS, torch.float32, caches=caches) == held
    rollout.free()
    assert not any(memory.nbytes for memory in (rollout.memory, *rollout.caches.values()))


@torch.no_grad()
def test_one_chunk_predicted_together_is_predicted(network) -> None:
    def first(together: bool) -> Tensor:
        rollout = rollout_of(network, RingMemory)
        chunk, level = rollout.chunks[0], rollout.chunks[0].levels[1]
        x = rollout.draw(chunk, level)
        return (
            rollout.predict_together([(x, level, chunk)])[0]
            if together
            else rollout.predict(x, level, chunk)
        )

    assert (first(True) - first(False)).abs().max() < 1e-5


@torch.no_grad()
def test_chunks_predicted_together_have_their_own_levels_and_see_each_other(network) -> None:
    reports = []
    rollout = rollout_of(network, RingMemory)
    rollout.callback = reports.append
    one, two = rollout.chunks[:2]
    levels = one.levels
    x = [rollout.draw(one, levels[0]), rollout.draw(two, levels[0])]
    parts = [(x[0], levels[2], one), (x[1], levels[0], two)]
    first, second = rollout.predict_together(parts)
    assert [(p.chunk.index, p.level) for p in reports] == [(1, 0), (0, 2)]
    times = torch.tensor([[levels[2].t] * 3 + [levels[0].t] * 3], dtype=torch.float64)
    view = GraphMemory(rollout.memory.plan).view(range(6))
    flow = network(torch.cat(x, 2), times, rollout.text, view)
    assert (first - (x[0] - levels[2].sigma * flow[:, :, :3])).abs().max() < 1e-5
    assert (second - (x[1] - levels[0].sigma * flow[:, :, 3:])).abs().max() < 1e-5


@torch.no_grad()
def test_chunks_may_come_from_an_iterator_without_a_known_end(network) -> None:
    def endless():
        index = 0
        while True:
            yield Chunk(index, 3 * index, 3, SF.chunk_levels())
            index += 1

    preset = SF.changed(window=9, sink=3)
    known, unknown = (rollout_of(network, RingMemory, preset=preset) for _ in range(2))
    reports = []
    unknown.chunks, unknown.callback = endless(), reports.append
    for x0, expected in zip(self_forcing().run(unknown), self_forcing().run(known), strict=False):
        assert torch.equal(x0, expected)
    assert {report.chunks for report in reports} == {None}
    few = rollout_of(network, RingMemory)
    few.chunks = iter(few.chunks)
    assert torch.equal(torch.cat(list(self_forcing().run(few)), 2), run(network))


def test_a_timeline_of_one_scene_is_a_prompt(network) -> None:
    assert torch.equal(run(network, context=Timeline.of(CONTEXT)), run(network))
    assert torch.equal(
        run(network, context=Timeline((Scene(0, CONTEXT), Scene(FRAMES, -CONTEXT)))), run(network)
    )


@pytest.mark.parametrize("transition", [Keep(), Recache(FRAMES), Flush(FRAMES)])
def test_a_switch_to_the_same_prompt_changes_nothing(network, transition) -> None:
    same = Timeline((Scene(0, CONTEXT), Scene(4, CONTEXT, transition)))
    assert torch.equal(run(network, context=same), run(network))


def test_a_scene_holds_from_the_first_chunk_that_begins_behind_its_start(network) -> None:
    plain = run(network)
    for start, first in ((3, 3), (4, 6), (6, 6), (7, 9)):
        switched = run(network, context=Timeline((Scene(0, CONTEXT), Scene(start, -CONTEXT))))
        assert torch.equal(switched[:, :, :first], plain[:, :, :first])
        assert (
            switched[:, :, first : first + 3] - plain[:, :, first : first + 3]
        ).abs().max() > 1e-3


@pytest.mark.parametrize(("window", "sink"), [(-1, 0), (9, 3), (7, 1)])
def test_a_recache_is_the_run_whose_history_was_written_under_the_new_prompt(
    network, window, sink
) -> None:
    preset = SF.changed(window=window, sink=sink)
    plain, recached = (
        run(
            network,
            preset=preset,
            context=Timeline((Scene(0, CONTEXT), Scene(9, -CONTEXT, transition))),
        )
        for transition in (Keep(), Recache(FRAMES))
    )
    assert torch.equal(plain[:, :, :9], recached[:, :, :9])
    assert (plain[:, :, 9:] - recached[:, :, 9:]).abs().max() > 1e-4
    initial = plain[:, :, :9]
    whole = RunPlan(preset, 6, HEIGHT, WIDTH, 2, given=9)
    anew = torch.cat(list(sample(network, -CONTEXT, whole, initial=initial)), 2)
    if window < 0:
        assert torch.equal(recached[:, :, 9:], anew)


def test_a_recache_of_a_few_frames_leaves_the_sink_and_forgets_the_rest(network) -> None:
    preset = SF.changed(window=12, sink=3)
    few = Timeline((Scene(0, CONTEXT), Scene(9, -CONTEXT, Recache(3))))
    plan = RunPlan(preset, FRAMES, HEIGHT, WIDTH)
    rollout = Rollout.of(network, few, plan, WhiteNoise(0))
    with torch.no_grad():
        chunks = self_forcing().run(rollout)
        for _ in range(3):
            next(chunks)
        sink = [rollout.memory.store.prefix(layer, 3).key.clone() for layer in range(2)]
        next(chunks)
    assert [held.frame for held in rollout.memory.ledger.held] == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert all(
        torch.equal(rollout.memory.store.prefix(layer, 3).key, sink[layer]) for layer in range(2)
    )
    assert sum(chunk.length for _, chunk in rollout.recent) == 3


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 5, 4)])
def test_a_timeline_begins_at_0_and_goes_on(starts) -> None:
    with pytest.raises(ValueError, match="scenes"):
        Timeline(tuple(Scene(start, "a") for start in starts))
    assert Timeline.of("a").map(str.upper).scenes[0].prompt == "A"


@pytest.mark.parametrize(
    ("positions", "past", "chunk"),
    [
        (Absolute(), (0, 1, 7, 8), (9, 10)),
        (Relative(), (0, 1, 2, 3), (4, 5)),
        (SinkAdjacent(), (5, 6, 7, 8), (9, 10)),
        (Cut(45), (0, 1, 2, 3), (45, 46)),
    ],
)
def test_positions_of_a_sink_of_two_and_two_recent_frames(positions, past, chunk) -> None:
    assert positions.place([0, 1, 7, 8], [9, 10], sink=2) == (past, chunk)


def test_a_sink_stands_before_the_chunk_where_nothing_lies_between() -> None:
    assert SinkAdjacent().place([0, 1], [8, 9], sink=2) == ((6, 7), (8, 9))
    assert SinkAdjacent().place([], [0, 1], sink=0) == ((), (0, 1))


@torch.no_grad()
def test_moving_positions_equal_absolute_ones_until_the_window_is_full(network) -> None:
    preset = SF.changed(window=9, sink=3)

    def clip(positions) -> Tensor:
        rollout = rollout_of(network, RingMemory, preset=preset)
        plan = replace(rollout.memory.plan, keys="raw", positions=positions)
        return torch.cat(list(self_forcing().run(replace(rollout, memory=RingMemory(plan)))), 2)

    absolute, relative, adjacent = (clip(kind) for kind in (Absolute(), Relative(), SinkAdjacent()))
    assert torch.equal(relative[:, :, :9], absolute[:, :, :9])
    assert torch.equal(adjacent[:, :, :9], absolute[:, :, :9])
    assert (adjacent[:, :, 9:] - absolute[:, :, 9:]).abs().max() > 1e-4
    assert (
        relative - adjacent
    ).abs().max() < 1e-3  # RoPE sees distances alone, and these are the same


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda frames: frames.take(0, [[0]]), "int64"),
        (lambda frames: frames.take(0, torch.zeros(3, dtype=torch.long)), "int64"),
        (lambda frames: frames.take(0, torch.zeros(2, 3)), "int64"),
        (lambda frames: frames.means(0), "means = True"),
        (lambda frames: None, "NoneType"),
    ],
)
@torch.no_grad()
def test_what_a_policy_gets_wrong_is_one_line(network, kind, read, message) -> None:
    class Wrong(Policy):
        name = "wrong"

        def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
            return read(frames)

    with pytest.raises(ValueError, match=message):
        next(self_forcing().run(rollout_of(network, kind, Wrong())))
