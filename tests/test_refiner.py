"""The noise refiner: an untrained one changes nothing, and its forms agree."""

import dataclasses

import pytest
import torch
from torch import nn

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.positions import Absolute, Relative
from autorefiner.refiner.memory.reflect import ReflectiveCache, reflect
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.noise.refiner import HEAD, Branches, Refiner, merged, target_modules
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.lora import LoraPair

from tiny import TINY, tiny_network
from tiny_refiner import pairs_for

PLAN = RunPlan(PRESETS["self-forcing"], 7, 4, 4, batch=2)
CACHES = [
    ReflectiveCache(history, previous)
    for history in ("shared", "none")
    for previous in ("pending", "joint", "none")
]


def context(seed: int = 0) -> torch.Tensor:
    return torch.randn(
        2, TINY.text_len, TINY.text_dim, generator=torch.Generator().manual_seed(seed)
    )


def run(network: CausalWan, **options) -> torch.Tensor:
    plan = options.pop("plan", PLAN)
    return torch.cat(list(sample(network, context(), plan, seed=3, **options)), dim=2)


def counted(network: CausalWan) -> list[int]:
    """Record the latent frames of every pass through the network's final layer from now on."""
    calls: list[int] = []
    frame = PLAN.height * PLAN.width // 4  # tokens
    network.model.head.head.register_forward_hook(
        lambda _, inputs, __: calls.append(inputs[0].shape[1] // frame)
    )
    return calls


def test_every_linear_of_the_blocks_has_a_branch_and_the_head() -> None:
    targets = target_modules(tiny_network().model)
    assert len(targets) == 10 * TINY.num_layers + 1
    assert HEAD in targets
    assert all(isinstance(module, nn.Linear) for module in targets.values())


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_a_fresh_refiner_changes_no_bit(cache) -> None:
    network = tiny_network()
    base = run(network)
    assert torch.equal(
        run(network, refiner=Refiner(merged(network, pairs_for(network, fresh=True)), cache)), base
    )
    branches = Branches(network.model, pairs_for(network, fresh=True))
    assert torch.equal(run(network, refiner=Refiner(network, cache, on=branches.on)), base)


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_merged_weights_and_branches_agree_and_leave_the_base_alone(cache) -> None:
    network = tiny_network()
    base, pairs = run(network), pairs_for(network)
    copied = run(network, refiner=Refiner(merged(network, pairs), cache))
    branches = Branches(network.model, pairs)
    branched = run(network, refiner=Refiner(network, cache, on=branches.on))
    assert (copied - base).abs().max() > 1e-2
    assert (copied - branched).abs().max() < 1e-4
    branches.remove()
    assert torch.equal(run(network), base)


@torch.no_grad()
def test_the_scale_of_a_pair_counts_merged_and_as_a_branch() -> None:
    """scale · up · down: a scale of 0.5 equals factors half as large."""
    network, cache = tiny_network(), ReflectiveCache("shared", "none")
    whole = pairs_for(network)
    scaled = {name: dataclasses.replace(pair, scale=0.5) for name, pair in whole.items()}
    halved = {name: LoraPair(pair.down, 0.5 * pair.up, 1.0) for name, pair in whole.items()}
    expected = run(network, refiner=Refiner(merged(network, halved), cache))
    assert (
        run(network, refiner=Refiner(merged(network, scaled), cache)) - expected
    ).abs().max() < 1e-4
    branches = Branches(network.model, scaled)
    assert (
        run(network, refiner=Refiner(network, cache, on=branches.on)) - expected
    ).abs().max() < 1e-4
    assert (
        run(network, refiner=Refiner(merged(network, whole), cache)) - expected
    ).abs().max() > 1e-2


def test_strength_scales_and_zero_is_the_base_with_no_pass() -> None:
    network = tiny_network()
    base, refiner = run(network), Refiner(merged(network, pairs_for(network)))
    calls = counted(refiner.network)
    assert torch.equal(run(network, refiner=dataclasses.replace(refiner, strength=0.0)), base)
    assert not calls
    assert not torch.equal(
        run(network, refiner=dataclasses.replace(refiner, strength=0.5)),
        run(network, refiner=refiner),
    )


@pytest.mark.parametrize(
    ("previous", "levels", "passes"),
    [
        ("pending", {750, 500, 250}, [3, 3, 3, 3, 3, 3, 1, 1, 1]),
        ("joint", {750}, [6, 6, 2]),
        ("none", {1000}, [3, 3, 1]),
    ],
)
def test_passes_of_the_refiner_are_one_a_refined_level_and_chunk(previous, levels, passes) -> None:
    network = tiny_network()
    refiner = Refiner(
        merged(network, pairs_for(network)), ReflectiveCache("shared", previous), frozenset(levels)
    )
    calls = counted(refiner.network)
    run(network, refiner=refiner)
    assert calls == passes


def memories(keys: str = "rotated") -> tuple[RingMemory, GraphMemory]:
    plan = MemoryPlan.of(
        TINY, (2, 16, 9, 4, 4), window_frames=6, sink_frames=1, keys=keys, spare_frames=3,
        positions=Absolute() if keys == "rotated" else Relative(),
    )  # fmt: skip
    return RingMemory(plan), GraphMemory(plan)


@torch.no_grad()
@pytest.mark.parametrize("keys", ["rotated", "raw"])
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_the_memory_of_sampling_and_of_training_reflect_alike(cache, keys) -> None:
    network = tiny_network()
    tphi, text = merged(network, pairs_for(network)), network.text(context(), 2)
    generator = torch.Generator().manual_seed(0)
    found = []
    for memory in memories(keys):
        generator.manual_seed(0)
        for start in (0, 3, 6):
            frames = tuple(range(start, start + 3))
            x, x0, noise = torch.randn(3, 2, 16, 3, 4, 4, generator=generator)
            network(x, torch.tensor([[900.0]]), text, memory.view(frames))
            joint = cache.previous == "joint"
            t = torch.tensor([[0.0] * 3 + [700.0] * 3]) if joint else torch.tensor([[700.0]])
            flow = tphi(
                torch.cat((x0, noise), 2) if joint else noise,
                t,
                text,
                reflect(memory, frames, cache),
            )
            found.append(flow)
            network(x0, torch.tensor([[0.0]]), text, memory.view(frames))
            memory.commit()
    for ring, graph in zip(found[:3], found[3:], strict=True):
        assert (ring - graph).abs().max() < 1e-4


@torch.no_grad()
def test_joint_equals_a_pass_that_writes_x0_and_then_one_that_reads_it() -> None:
    network = tiny_network()
    tphi, text = merged(network, pairs_for(network)), network.text(context())
    memory, _ = memories()
    first, x, x0, noise = torch.randn(4, 2, 16, 3, 4, 4)
    network(first, torch.tensor([[0.0]]), text, memory.view((0, 1, 2)))
    memory.commit()
    frames = (3, 4, 5)
    network(x, torch.tensor([[900.0]]), text, memory.view(frames))
    t = torch.tensor([[0.0] * 3 + [700.0] * 3])
    together = tphi(
        torch.cat((x0, noise), 2),
        t,
        text,
        reflect(memory, frames, ReflectiveCache("shared", "joint")),
    )
    tphi(x0, torch.tensor([[0.0]]), text, memory.view(frames), keys_only=True)
    apart = tphi(
        noise,
        torch.tensor([[700.0]]),
        text,
        reflect(memory, frames, ReflectiveCache("shared", "pending")),
    )
    assert (together[:, :, 3:] - apart).abs().max() < 1e-5


@torch.no_grad()
def test_reflection_sees_what_its_switches_say() -> None:
    """What is switched off does not reach the residual; what is on does."""
    network = tiny_network()
    tphi, text = merged(network, pairs_for(network)), network.text(context())

    def residual(cache: ReflectiveCache, history: float, previous: float) -> torch.Tensor:
        memory, _ = memories()
        generator = torch.Generator().manual_seed(0)
        past, x, x0, noise = torch.randn(4, 2, 16, 3, 4, 4, generator=generator)
        network(past + history, torch.tensor([[0.0]]), text, memory.view((0, 1, 2)))
        memory.commit()
        refiner, chunk = Refiner(tphi, cache), next(iter(chunks()))
        network(x + previous, torch.tensor([[900.0]]), text, memory.view(chunk.frames))
        return refiner.residual(
            noise, x0 + previous, chunk.levels[1], chunk, memory, text, torch.float32
        )

    for cache in CACHES:
        same = residual(cache, 0, 0)
        assert torch.equal(residual(cache, 1, 0), same) == (
            cache.history == "none" and cache.previous != "pending"
        )
        assert torch.equal(residual(cache, 0, 1), same) == (cache.previous == "none")


def chunks():
    from autorefiner.refiner.schedule import plan_chunks

    return plan_chunks(PRESETS["self-forcing"], 6)[1][1:]


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    network = tiny_network()
    pairs = pairs_for(network)
    with pytest.raises(ValueError, match="another architecture"):
        merged(network, {HEAD: pairs[HEAD]})
    small = tiny_network(dataclasses.replace(TINY, dim=64))
    with pytest.raises(ValueError, match="another size"):
        merged(small, pairs)
    broken = pairs | {HEAD: LoraPair(pairs[HEAD].down * float("nan"), pairs[HEAD].up, 1.0)}
    with pytest.raises(ValueError, match="not finite"):
        Branches(network.model, broken)
    with pytest.raises(ValueError, match="predict"):
        reflect(memories()[0], (0, 1, 2), ReflectiveCache())
    with pytest.raises(ValueError, match="shared"):
        ReflectiveCache(history="some")
    with pytest.raises(ValueError, match="initial noise"):
        run(
            network,
            refiner=Refiner(
                merged(network, pairs), ReflectiveCache("shared", "joint"), frozenset({1000})
            ),
        )
