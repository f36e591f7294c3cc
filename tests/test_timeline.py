"""Prompts that change over time: in extensions, with caches by name, and beside other options."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.policies import TopFrames
from autorefiner.refiner.memory.positions import Cut
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import check_switches, sample
from autorefiner.refiner.samplers import (
    SAMPLERS,
    SelfRefine,
    best_of_n,
    hiar,
    search_over_path,
    self_forcing,
    self_refine,
)
from autorefiner.refiner.samplers.method import any_timeline
from autorefiner.refiner.samplers.self_forcing import predict_chunk
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.timeline import Flush, Keep, Recache, Scene, Timeline, stack
from autorefiner.refiner.training.rewards.verifier import RewardVerifier

from tiny import tiny_network
from tiny_refiner import pairs_for

SF = PRESETS["self-forcing"]
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
FRAMES, HEIGHT, WIDTH = 15, 4, 6


@pytest.fixture(scope="module")
def network():
    return tiny_network()


def run(network, context, preset=SF, initial: Tensor | None = None, **options) -> Tensor:
    given = 0 if initial is None else initial.shape[2]
    plan = RunPlan(preset, FRAMES - given, HEIGHT, WIDTH, given=given)
    return torch.cat(list(sample(network, context, plan, initial=initial, **options)), 2)


@pytest.mark.parametrize("transition", [Keep(), Recache(6), Recache(FRAMES), Flush(0), Flush(2)])
@pytest.mark.parametrize("start", [3, 6, 9])
def test_a_run_that_goes_on_has_the_scenes_of_its_given_chunks(network, transition, start) -> None:
    preset = SF.changed(window=12, sink=3)
    timeline = Timeline((Scene(0, CONTEXT), Scene(start, -CONTEXT, transition)))
    whole = run(network, timeline, preset)
    rest = run(network, timeline, preset, initial=whole[:, :, :6])
    assert torch.equal(rest, whole[:, :, 6:])


def test_the_last_of_several_scenes_within_a_chunk_counts(network) -> None:
    both = Timeline((Scene(0, CONTEXT), Scene(4, 2 * CONTEXT), Scene(5, -CONTEXT)))
    one = Timeline((Scene(0, CONTEXT), Scene(5, -CONTEXT)))
    assert torch.equal(run(network, both), run(network, one))


def test_a_scene_may_flush_or_cut(network) -> None:
    preset = SF.changed(window=9, sink=1, positions="relative")
    plain = run(network, CONTEXT, preset)
    for transition in (Flush(1), Cut(45)):
        changed = run(network, Timeline((Scene(0, CONTEXT), Scene(6, CONTEXT, transition))), preset)
        assert torch.equal(changed[:, :, :6], plain[:, :, :6])
        assert (changed[:, :, 6:9] - plain[:, :, 6:9]).abs().max() > 1e-5
    with pytest.raises(ValueError, match="relative positions"):
        run(network, Timeline((Scene(0, CONTEXT), Scene(6, CONTEXT, Cut(45)))))


def test_a_refiner_follows_the_timeline(network) -> None:
    refiner = Refiner(merged(network, pairs_for(network)), ReflectiveCache("shared", "pending"))
    same = Timeline((Scene(0, CONTEXT), Scene(6, CONTEXT, Recache(FRAMES))))
    assert torch.equal(run(network, same, refiner=refiner), run(network, CONTEXT, refiner=refiner))
    rollout = Rollout.of(
        network, Timeline((Scene(0, CONTEXT), Scene(3, -CONTEXT))), RunPlan(SF, 6, HEIGHT, WIDTH),
        WhiteNoise(0), refiner=refiner,
    )  # fmt: skip
    texts = [rollout.refiner_text[0].key.clone() for _ in rollout]
    assert torch.equal(texts[0], refiner.text(CONTEXT)[0].key)
    assert torch.equal(texts[1], refiner.text(-CONTEXT)[0].key)


@torch.no_grad()
def test_every_cache_holds_the_given_chunks(network) -> None:
    plan = RunPlan(SF, 6, HEIGHT, WIDTH, given=6)
    caches = hiar().caches(plan.chunks[-1].levels)
    initial = torch.randn(1, 16, 6, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    rollout = Rollout.of(network, CONTEXT, plan, WhiteNoise(0), caches=caches, initial=initial)
    rollout.commit_given()
    memories = [rollout.cache(name) for name in (None, *caches)]
    assert len({id(memory) for memory in memories}) == 4
    for memory in memories:
        assert [held.frame for held in memory.ledger.held] == [*range(6)]
        assert torch.equal(memory.store.prefix(1, 6).key, memories[0].store.prefix(1, 6).key)
    extended = torch.cat(list(hiar().run(rollout)), 2)
    assert torch.equal(
        extended, torch.cat(list(sample(network, CONTEXT, plan, initial=initial, method=hiar())), 2)
    )
    assert not torch.equal(extended, run(network, CONTEXT, method=hiar())[:, :, 6:12])


def test_samples_that_keep_their_pending_keys_keep_their_means(network) -> None:
    """P&P with retrieval and a refiner: both memories give the same clip, a sample alone too."""
    refiner = Refiner(merged(network, pairs_for(network)), ReflectiveCache("shared", "pending"))
    method = self_refine({750: 3, 500: 2}, threshold=0.35, enough=0.4)

    def clip(kind: type, batch: int) -> Tensor:
        plan = RunPlan(SF, 9, HEIGHT, WIDTH, batch, policy=TopFrames(k=1, recent=1))
        rollout = Rollout.of(network, CONTEXT, plan, WhiteNoise(4), memory=kind, refiner=refiner)
        with torch.no_grad():
            return torch.cat(list(method.run(rollout)), 2)

    ring = clip(RingMemory, 3)
    assert (clip(GraphMemory, 3) - ring).abs().max() < 1e-4
    assert (clip(RingMemory, 1) - ring[:1]).abs().max() < 1e-4


def test_scripts_may_give_a_method_as_they_used_to(network) -> None:
    def mine(rollout):
        for chunk in rollout.chunks:
            x0 = predict_chunk(rollout, chunk)
            rollout.commit(x0, chunk)
            yield x0

    expected = run(network, CONTEXT)
    assert torch.equal(run(network, CONTEXT, method=SAMPLERS["self-forcing"]), expected)
    assert torch.equal(run(network, CONTEXT, method=mine), expected)
    assert torch.equal(run(network, CONTEXT, method=SelfRefine({})), expected)
    assert not torch.equal(run(network, CONTEXT, method=SAMPLERS["ode"]), expected)
    with pytest.raises(ValueError, match="Method"):
        run(network, CONTEXT, method="ode")


def test_a_recache_protects_the_sink_or_rewrites_it(network) -> None:
    preset = SF.changed(window=12, sink=4)

    def memory_after(protect_sink: bool) -> tuple[Tensor, list[int], Tensor]:
        timeline = Timeline((Scene(0, CONTEXT), Scene(6, -CONTEXT, Recache(9, protect_sink))))
        rollout = Rollout.of(
            network, timeline, RunPlan(preset, FRAMES, HEIGHT, WIDTH), WhiteNoise(0)
        )
        with torch.no_grad():
            chunks = self_forcing().run(rollout)
            clip = torch.cat([next(chunks) for _ in range(2)], 2)
            before = rollout.memory.store.prefix(1, 4).key.clone()
            next(chunks)
        held = [held.frame for held in rollout.memory.ledger.held]
        sink = rollout.memory.store.prefix(1, 4).key
        return clip, held, torch.tensor([torch.equal(sink, before)])

    protected, rewritten = memory_after(True), memory_after(False)
    assert protected[1] == rewritten[1] == [*range(9)]
    assert protected[2].item() and not rewritten[2].item()


def test_an_unprotected_recache_of_all_is_a_run_with_that_prompt_and_those_frames(network) -> None:
    preset = SF.changed(window=12, sink=4)
    clips = {}
    for protect in (True, False):
        timeline = Timeline((Scene(0, CONTEXT), Scene(6, -CONTEXT, Recache(99, protect))))
        clips[protect] = run(network, timeline, preset)
    anew = run(network, -CONTEXT, preset, initial=clips[False][:, :, :6])
    assert (clips[False][:, :, 6:] - anew).abs().max() < 1e-4
    assert (clips[True][:, :, 6:] - anew).abs().max() > 1e-4


def test_a_recache_longer_than_the_window_rewrites_what_the_window_holds(network) -> None:
    preset = SF.changed(window=6)
    clips = [
        run(network, Timeline((Scene(0, CONTEXT), Scene(9, -CONTEXT, Recache(frames)))), preset)
        for frames in (3, 6, 9, 99)
    ]
    assert torch.equal(clips[2], clips[3])
    assert all(torch.equal(clip[:, :, :9], clips[0][:, :, :9]) for clip in clips)
    anew = run(network, -CONTEXT, preset, initial=clips[3][:, :, :9])
    assert (clips[3][:, :, 9:] - anew).abs().max() < 1e-4


@pytest.mark.parametrize("transition", [Recache(3), Recache(6, False), Recache(FRAMES)])
def test_a_prompt_that_is_in_force_changes_nothing(network, transition) -> None:
    preset = SF.changed(window=7, sink=1)
    same = Timeline((Scene(0, CONTEXT), Scene(9, CONTEXT.clone(), transition)))
    assert torch.equal(run(network, same, preset), run(network, CONTEXT, preset))


def test_a_cut_comes_with_any_transition(network) -> None:
    preset = SF.changed(window=9, sink=1, positions="relative")
    clips = {
        (transition, cut): run(
            network, Timeline((Scene(0, CONTEXT), Scene(6, -CONTEXT, transition, cut))), preset
        )
        for transition in (Keep(), Flush(1), Recache(6))
        for cut in (None, Cut(45))
    }
    for transition in (Keep(), Flush(1), Recache(6)):
        plain, cut = clips[transition, None], clips[transition, Cut(45)]
        assert torch.equal(plain[:, :, :6], cut[:, :, :6])
        assert (plain[:, :, 6:9] - cut[:, :, 6:9]).abs().max() > 1e-5
    alone = Timeline((Scene(0, CONTEXT), Scene(6, -CONTEXT, Cut(45))))
    assert torch.equal(run(network, alone, preset), clips[Keep(), Cut(45)])


def test_a_method_that_cannot_switch_says_so_before_it_runs(network) -> None:
    plan = RunPlan(SF, 9, HEIGHT, WIDTH)
    keep = Timeline((Scene(0, "a"), Scene(3, "b")))
    recache = Timeline((Scene(0, "a"), Scene(3, "b", Recache(3))))
    check_switches(Timeline.of("a"), plan, hiar())
    with pytest.raises(ValueError, match="hiar"):
        check_switches(keep, plan, hiar())
    several = replace(hiar(), check_timeline=any_timeline)
    check_switches(keep, plan, several)
    with pytest.raises(ValueError, match="recache"):
        check_switches(recache, plan, several)


def stacked(network, timelines: list[Timeline], preset=SF) -> Tensor:
    plan = RunPlan(preset, FRAMES, HEIGHT, WIDTH, len(timelines))
    return torch.cat(list(sample(network, stack(timelines), plan, seed=0)), 2)


def test_each_sample_of_a_batch_may_have_its_timeline(network) -> None:
    """Each as alone: kept memories from other frames on, and a recache from the same one."""
    last = Scene(9, CONTEXT, Recache(FRAMES))
    early = Timeline((Scene(0, CONTEXT), Scene(3, -CONTEXT), last))
    late = Timeline((Scene(0, 2 * CONTEXT), Scene(6, -CONTEXT), last))
    both = stacked(network, [early, late])
    first = stacked(network, [early, early])
    second = stacked(network, [late, late])
    assert (both[0] - first[0]).abs().max() < 1e-4
    assert (both[1] - second[1]).abs().max() < 1e-4
    assert (both[0] - second[0]).abs().max() > 1e-3


def test_a_batch_shares_its_memory() -> None:
    def other(start: int, transition) -> Timeline:
        return Timeline((Scene(0, CONTEXT), Scene(start, -CONTEXT, transition)))

    assert len(stack([other(3, Flush(1)), other(3, Flush(1))]).scenes) == 2
    for pair in (
        [other(3, Flush(1)), other(6, Flush(1))],
        [other(3, Keep()), other(3, Recache(3))],
        [other(3, Cut()), Timeline.of(CONTEXT)],
        [other(3, Recache(3)), Timeline.of(CONTEXT)],
    ):
        with pytest.raises(ValueError, match="share one memory"):
            stack(pair)


@pytest.mark.parametrize("search", [best_of_n, search_over_path])
def test_a_search_judges_each_chunk_under_its_prompt(network, search) -> None:
    """A reward that follows the prompt picks the lowest value first, then the highest."""

    class Sign:
        prompts = Timeline((Scene(0, -1), Scene(6, 1)))

        def begin(self):
            return self

        def score(self, x0, chunk):
            return self.prompts.at(chunk.start).prompt * x0.mean(dim=(1, 2, 3, 4))

        def keep(self, x0, chunk):
            pass

    timeline = Timeline((Scene(0, CONTEXT), Scene(6, -CONTEXT, Recache(3))))
    searched = run(network, timeline, method=search(Sign(), 3)).mean(dim=(0, 1, 3, 4))
    plain = run(network, timeline).mean(dim=(0, 1, 3, 4))
    assert searched[:3].mean() < plain[:3].mean()
    assert searched[6:].mean() > plain[6:].mean()


def test_a_reward_is_given_the_prompts_of_the_chunk() -> None:
    chunks = RunPlan(SF, 9, HEIGHT, WIDTH).chunks
    timeline = Timeline((Scene(0, ["a"]), Scene(6, ["b"])))
    verifier = RewardVerifier(None, None, timeline)
    assert [verifier.prompts_of(chunk) for chunk in chunks] == [["a"], ["a"], ["b"]]
    assert RewardVerifier(None, None, ["a"]).prompts_of(chunks[2]) == ["a"]


def test_refined_runs_recache(network) -> None:
    refiner = Refiner(merged(network, pairs_for(network)), ReflectiveCache("shared", "pending"))
    timeline = Timeline((Scene(0, CONTEXT), Scene(6, -CONTEXT, Recache(FRAMES))))
    clip = run(network, timeline, refiner=refiner)
    anew = run(network, -CONTEXT, initial=clip[:, :, :6], refiner=refiner)
    assert (clip[:, :, 6:] - anew).abs().max() < 1e-4
