"""Prompts that change over time: in extensions, with caches by name, and beside other options."""

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
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import SAMPLERS, SelfRefine, hiar, self_refine
from autorefiner.refiner.samplers.self_forcing import predict_chunk
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.timeline import Flush, Keep, Recache, Scene, Timeline

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
