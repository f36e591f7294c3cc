"""Memory planned for a refiner and for a node's run, and attaching a plan to a network."""

import pytest
import torch
from torch import Tensor

from autorefiner.nodes.run import ModelFacts, Run, check_memory, held_bytes, plan_run
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.whole import WholeClip
from autorefiner.refiner.noise.file import RefinerCard
from autorefiner.refiner.noise.refiner import target_modules
from autorefiner.refiner.refiner_plan import RefinerPlan
from autorefiner.refiner.sample import RunPlan
from autorefiner.refiner.samplers import SAMPLERS, Method
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.lora import LoraPair

from tiny import TINY, tiny_network

PRESET = PRESETS["self-forcing"]
DTYPES = [torch.float32, torch.bfloat16]


def plan_of(network: CausalWan, dtype: torch.dtype = torch.float32, **options) -> RefinerPlan:
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for name, module in target_modules(network.model).items():
        out, into = module.weight.shape
        down, up = (
            0.1 * torch.randn(shape, generator=generator) for shape in ((2, into), (out, 2))
        )
        pairs[name] = LoraPair(down, up, 1.0)
    return RefinerPlan.of("a", pairs, RefinerCard(rank=2), PRESET.levels, dtype, **options)


@torch.no_grad()
def flow_of(network: CausalWan) -> Tensor:
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return network(
        x, torch.full((1, 1), 500.0), network.text(torch.ones(1, 8, TINY.text_dim)), WholeClip(2)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_refiner_takes_its_layers_merged_or_its_factors_as_branches(dtype) -> None:
    """TINY has 10 square layers of 128 a block and a head of 64 outputs; factors have rank 2."""
    plan = plan_of(tiny_network(), dtype)
    merged = (2 * 10 * 128 * 128 + 64 * 128) * dtype.itemsize
    branches = 2 * (2 * 10 * (128 + 128) + (64 + 128)) * dtype.itemsize
    assert (plan.chosen(merge=True).nbytes, plan.chosen(merge=False).nbytes) == (merged, branches)
    assert plan.nbytes == merged, "the larger, until the form is settled"


@pytest.mark.parametrize("form", ["merged", "unmerged"])
def test_an_attached_refiner_is_the_planned_one_and_leaves_the_network_as_it_was(form) -> None:
    network = tiny_network()
    before = flow_of(network)
    plan = plan_of(
        network, form=form, strength=0.5, levels=(500,), cache=ReflectiveCache("none", "joint")
    )
    with plan.attached(network) as refiner:
        assert (refiner.strength, refiner.levels, refiner.cache) == (
            0.5,
            {500},
            ReflectiveCache("none", "joint"),
        )
        with refiner.on():
            assert not torch.allclose(flow_of(refiner.network), before, atol=1e-3)
        assert torch.equal(flow_of(network), before)
    with pytest.raises(KeyError), plan.attached(network):
        raise KeyError
    with refiner.on():
        assert torch.equal(flow_of(network), before), "nothing is left to switch on"


class Counted:
    """A search that holds the given bytes for each video."""

    def sampler(self, verifier: object = None) -> Method:
        return SAMPLERS["self-forcing"]()

    def describe(self) -> str:
        return ""

    def nbytes(self, plan: RunPlan) -> int:
        return 1000 * plan.batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("search", [None, Counted()])
def test_a_run_of_a_node_holds_keys_its_refiner_and_its_search(dtype, refined, search) -> None:
    """K/V of 9 frames of 6 tokens a video, plus a chunk of 3 where it is refined."""
    plan = plan_of(tiny_network(), dtype) if refined else None
    run = Run(plan_run(PRESET, (2, 9, 4, 6), None), 0, "self-forcing", refined=plan, search=search)
    held = 2 * (9 + 3 * refined) * 6 * TINY.dim * 2 * TINY.num_layers * dtype.itemsize
    held += (plan.nbytes if refined else 0) + (2000 if search else 0)
    assert held_bytes(run, ModelFacts(TINY, dtype, None, 0)) == held
    check_memory(run, ModelFacts(TINY, dtype, None, held))
    with pytest.raises(ValueError, match="refiner" if refined else "keys"):
        check_memory(run, ModelFacts(TINY, dtype, None, held - 1))
