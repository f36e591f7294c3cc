"""Training a refiner: which parameters get gradients, what is retained, and rollouts."""

import gc
from functools import partial

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.noise.refiner import HEAD, Refiner, merged, target_modules
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import PRESETS, plan_chunks
from autorefiner.refiner.training.adapters import (
    FLOW_SHARE,
    attach_branches,
    branch_parameters,
    pairs_of,
)
from autorefiner.refiner.training.precision import for_training, mixed_precision
from autorefiner.refiner.training.self_rollout import self_rollout
from autorefiner.refiner.wan.causal import CausalWan, attention

from tiny import TINY, tiny_network

pytest.importorskip("peft")

FRAMES, RANK = 7, 4
SHAPE = (2, 16, FRAMES, 4, 4)
PRESET = PRESETS["self-forcing"]
CONTEXT = torch.randn(2, TINY.text_len, TINY.text_dim, generator=torch.Generator().manual_seed(0))
JOINT = ReflectiveCache("shared", "joint")


def rollout_of(base: CausalWan, refiner: Refiner | None, seed: int = 3) -> Rollout:
    plan = RunPlan(PRESET, FRAMES, 4, 4, batch=2)
    return Rollout.of(base, CONTEXT, plan, WhiteNoise(seed), memory=GraphMemory, refiner=refiner)


def sampled(base: CausalWan, refiner: Refiner | None = None) -> Tensor:
    return torch.cat(
        list(
            sample(base, CONTEXT, RunPlan(PRESET, FRAMES, 4, 4, batch=2), seed=3, refiner=refiner)
        ),
        2,
    )


def shaken(network: CausalWan) -> CausalWan:
    """Return the same tree with non-zero B factors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in branch_parameters(network).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("previous", ["pending", "joint", "none"])
def test_training_samples_what_sampling_samples(previous) -> None:
    base, cache = tiny_network(), ReflectiveCache("shared", previous)
    tree = shaken(attach_branches(base, RANK, silent_head=True))
    made = self_rollout(rollout_of(base, Refiner(tree, cache)), exit_level=3)
    assert (made - sampled(base, Refiner(merged(base, pairs_of(tree)), cache))).abs().max() < 1e-4
    assert torch.allclose(
        self_rollout(rollout_of(base, None), exit_level=3), sampled(base), atol=1e-5
    )


def test_every_chunk_ends_at_the_same_step() -> None:
    """Also with more levels in the first chunk, as in Causal-Forcing++'s 2-step model."""
    ends: dict[int, int] = {}
    rollout = rollout_of(tiny_network(), None)
    rollout.chunks = plan_chunks(PRESETS["causal-forcing-2step"], 3)[1]
    rollout.callback = lambda progress: ends.update(
        {progress.chunk.index: progress.chunk.levels[progress.level].step}
    )
    with torch.no_grad():
        self_rollout(rollout, exit_level=1)
    assert ends == {0: 500, 1: 500, 2: 500}


def test_a_fresh_tree_changes_no_bit_and_the_base_never_knows() -> None:
    base = tiny_network()
    before = sampled(base)
    tree = attach_branches(base, RANK, silent_head=True)
    assert torch.equal(sampled(base, Refiner(tree)), before)
    shaken(tree)
    assert not torch.equal(sampled(base, Refiner(tree)), before)
    assert torch.equal(sampled(base), before)
    assert {id(p) for p in base.model.parameters()} & {id(p) for p in tree.model.parameters()}


@pytest.mark.parametrize("cache", [ReflectiveCache(), JOINT], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_after_a_step_gradients_reach_every_factor_and_nothing_else(cache, checkpointing) -> None:
    base = tiny_network(checkpointing=checkpointing)
    tree = attach_branches(base, RANK, silent_head=True)
    factors = branch_parameters(tree)
    assert len(factors) == 2 * len(target_modules(base.model))
    optimizer = torch.optim.AdamW(factors.values(), 1e-3)

    def step() -> set[str]:
        optimizer.zero_grad()
        self_rollout(
            rollout_of(base, Refiner(tree, cache)), exit_level=2
        ).square().mean().backward()
        assert all(factor.grad is not None for factor in factors.values())
        return {name for name, factor in factors.items() if factor.grad.any()}

    assert step() == {f"{HEAD}.lora_B.default.weight"}
    optimizer.step()
    # A only acts through B.
    assert step() == {name for name in factors if "lora_B" in name or HEAD in name}
    optimizer.step()
    assert step() == set(factors)
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_factors_that_were_used_without_gradients_get_theirs_in_bf16() -> None:
    """Levels before the trained one use the same factors; a cached cast would have no gradient."""
    found = []
    for precision in ("fp32", "bf16"):
        base = tiny_network()
        tree = shaken(attach_branches(base, RANK, silent_head=True))
        with mixed_precision(torch.device("cpu"), precision):
            # Newer torch casts correctly anyway.
            assert precision == "fp32" or not torch.is_autocast_cache_enabled()
            made = self_rollout(rollout_of(base, Refiner(tree)), exit_level=3)
        made.float().square().mean().backward()
        found.append(
            {name: factor.grad.flatten() for name, factor in branch_parameters(tree).items()}
        )
    for name, gradient in found[0].items():
        assert torch.cosine_similarity(gradient, found[1][name], dim=0) > 0.99, name


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        base = tiny_network(checkpointing=checkpointing)
        tree = shaken(attach_branches(base, RANK, silent_head=True))
        self_rollout(
            rollout_of(base, Refiner(tree, JOINT)), exit_level=1
        ).square().mean().backward()
        found.append({name: factor.grad for name, factor in branch_parameters(tree).items()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-7), name


def test_nothing_of_the_graph_is_retained_over_fifty_steps() -> None:
    base = tiny_network()
    tree = shaken(attach_branches(base, RANK, silent_head=True))
    optimizer = torch.optim.AdamW(branch_parameters(tree).values(), 1e-4)
    alive = []
    for index in range(50):
        optimizer.zero_grad(set_to_none=True)
        self_rollout(
            rollout_of(base, Refiner(tree), seed=index), exit_level=1
        ).square().mean().backward()
        optimizer.step()
        if index in (4, 49):
            gc.collect()
            alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert alive[0] == alive[1]


def test_a_branch_has_a_rank_of_at_least_1() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        attach_branches(tiny_network(), 0, silent_head=True)


@torch.no_grad()
def test_a_branch_adds_b_times_a() -> None:
    base = tiny_network()
    tree = shaken(attach_branches(base, RANK, silent_head=True))
    x = torch.randn(5, TINY.dim, generator=torch.Generator().manual_seed(2))
    for name in ("blocks.1.ffn.0", "blocks.0.cross_attn.k", HEAD):
        own, pair = base.model.get_submodule(name), pairs_of(tree)[name]
        assert (pair.scale, pair.down.shape[0]) == (1, RANK)
        before = torch.zeros(()) if name == HEAD else own(x)
        torch.testing.assert_close(
            tree.model.get_submodule(name)(x), before + x @ pair.down.T @ pair.up.T
        )


@pytest.mark.parametrize("cache", [ReflectiveCache(), JOINT], ids=str)
def test_from_the_head_a_residual_is_the_bases_flow_times_what_b_says(cache) -> None:
    """With A = W of the head and B = −c I: Δ = −c (v − bias) in the refined pass; B = 0 gives 0."""
    base = tiny_network()
    tree = attach_branches(base, 4, silent_head=True, start="head")
    head = pairs_of(tree)[HEAD]
    assert torch.equal(head.down, base.model.head.head.weight)
    assert head.up.shape == (64, 64) and head.scale == 1 and not head.up.any()
    assert torch.equal(sampled(base, Refiner(tree, cache)), sampled(base))
    loud = attach_branches(base, 4, silent_head=False)  # the base itself as T_φ: its flow
    with torch.no_grad():
        tree.model.get_submodule(HEAD).lora_B["default"].weight.copy_(-0.1 * torch.eye(64))
        loud.model.get_submodule(HEAD).base_layer.bias.zero_()
    seen: dict[str, list[Tensor]] = {"head": [], "flow": []}
    for name, network in (("head", tree), ("flow", loud)):
        watch = partial(lambda residuals, _, residual, __: residuals.append(residual), seen[name])
        refiner = Refiner(network, cache, frozenset({750}), watch=watch)
        self_rollout(rollout_of(base, refiner), exit_level=1)
    torch.testing.assert_close(seen["head"][0], -0.1 * seen["flow"][0])


@pytest.mark.parametrize(("start", "reached"), [("head", False), ("flow", True)])
def test_from_the_flow_a_gradient_reaches_every_branch_at_once(start: str, reached: bool) -> None:
    """Start "flow" is B = −c I on the base's head; through a B of zero nothing passes."""
    base = tiny_network()
    tree = attach_branches(base, 4, silent_head=True, start=start)
    head, expected = pairs_of(tree)[HEAD], -FLOW_SHARE * torch.eye(64)
    assert torch.equal(head.down, base.model.head.head.weight)
    assert torch.equal(head.up, expected if reached else torch.zeros(64, 64))
    self_rollout(rollout_of(base, Refiner(tree, ReflectiveCache())), 1).square().sum().backward()
    ups = {
        name: factor.grad for name, factor in branch_parameters(tree).items() if "lora_B" in name
    }
    assert ups.pop(f"{HEAD}.lora_B.default.weight").any()
    assert all(bool(gradient.any()) == reached for gradient in ups.values())


def test_only_a_refiner_starts_from_the_head() -> None:
    base = tiny_network()
    ranks = {
        (silent, start): pairs_of(attach_branches(base, 4, silent_head=silent, start=start))[
            HEAD
        ].rank
        for silent in (True, False)
        for start in ("head", "flow", "random")
    }
    assert ranks == {
        (True, "head"): 64,
        (True, "flow"): 64,
        (True, "random"): 4,
        (False, "head"): 4,
        (False, "flow"): 4,
        (False, "random"): 4,
    }
    names = {
        name
        for name, one in branch_parameters(
            attach_branches(base, 4, silent_head=True, start="head")
        ).items()
    }
    assert f"{HEAD}.lora_A.default.weight" in names  # trainable, like all others


def test_the_rank_of_the_head_is_at_most_its_64_outputs() -> None:
    for rank in (64, 65):
        pairs = pairs_of(attach_branches(tiny_network(), rank, silent_head=True))
        assert {name: pair.rank for name, pair in pairs.items()} == {
            **dict.fromkeys(pairs, rank),
            HEAD: 64,
        }
        assert {pair.scale for pair in pairs.values()} == {1}


def test_a_residual_is_watched_with_its_graph() -> None:
    base = tiny_network()
    tree = shaken(attach_branches(base, RANK, silent_head=True))
    seen: list[tuple[bool, int]] = []
    refiner = Refiner(
        tree, watch=lambda noise, residual, level: seen.append((residual.requires_grad, level.step))
    )
    self_rollout(rollout_of(base, refiner), exit_level=2)
    assert seen == [(False, 750), (True, 500)] * 3


def test_on_a_gpu_no_training_attends_by_cudnn(monkeypatch) -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind()
    asked = []

    def watched(*tensors: torch.Tensor) -> torch.Tensor:
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*tensors)

    monkeypatch.setattr("autorefiner.refiner.training.precision.attention", watched)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    found = for_training(tiny_network(), torch.device("cuda")).kernels.attention(q, k, v)
    assert asked == [False] and torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.equal(found, attention(q, k, v))
