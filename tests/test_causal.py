"""The causal forward: one pass over many chunks equals many over one; gradients are right."""

import pytest
import torch
import torch.nn.functional as F

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.rollout import predict_x0
from autorefiner.refiner.wan.causal import CausalWan, Kernels, timestep_features
from autorefiner.refiner.wan.rope import axis_pairs, rotate, rotation_table
from autorefiner.refiner.wan.transformer import (
    WAN_1_3B,
    WAN_14B,
    RMSNorm,
    WanConfig,
    WanTransformer,
)
from autorefiner.refiner.wan.upload import cached_tensors

from tiny import TINY, tiny_network

SHAPE = (1, 16, 9, 4, 6)  # B, C, F, h, w: three chunks of three frames


def memory_plan(shape=SHAPE, config=TINY, **options) -> MemoryPlan:
    return MemoryPlan.of(config, shape, **options)


def latents(shape=SHAPE, seed=2, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"), [(WAN_1_3B, 825, 1418996800), (WAN_14B, 1095, 14288491584)]
)
def test_published_sizes_have_their_tensors(config, tensors, parameters) -> None:
    with torch.device("meta"):
        state = WanTransformer(config).state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert state["patch_embedding.weight"].shape == (config.dim, 16, 1, 2, 2)
    assert state["blocks.0.modulation"].shape == (1, 6, config.dim)
    assert state["head.head.weight"].shape == (64, config.dim)


@torch.no_grad()
def test_chunks_in_turn_equal_one_masked_parallel_pass(network, context) -> None:
    x, chunk = latents(), 3
    tokens = chunk * 2 * 3  # of a chunk
    order = torch.arange(3).repeat_interleave(tokens)
    mask = order[:, None] >= order[None, :]

    def masked(q, k, v):
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        own = mask if k.shape[2] == q.shape[2] else None  # none in cross-attention
        return F.scaled_dot_product_attention(q, k, v, attn_mask=own).transpose(1, 2).flatten(2)

    parallel = CausalWan(network.model, network.config, Kernels(attention=masked))
    t = torch.full((1, 1), 625.0)
    text = network.text(context)
    whole = parallel(x, t, text, GraphMemory(memory_plan()).view(range(9)))

    memory, parts = RingMemory(memory_plan()), []
    for start in (0, 3, 6):
        view = memory.view(range(start, start + 3))
        parts.append(network(x[:, :, start : start + 3], t, text, view))
        memory.commit()
    assert (torch.cat(parts, 2) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_one_timestep_for_all_equals_one_for_each_frame(network, context) -> None:
    text, x = network.text(context), latents((2, 16, 3, 4, 6))
    flows = [
        network(x, t, text, GraphMemory(memory_plan((2, 16, 3, 4, 6))).view(range(3)))
        for t in (torch.full((1, 1), 833.0), torch.full((2, 1), 833.0), torch.full((2, 3), 833.0))
    ]
    assert (flows[1] - flows[0]).abs().max() < 1e-5
    assert torch.equal(flows[2], flows[1])


@torch.no_grad()
def test_timesteps_are_per_frame(network, context) -> None:
    """A frame's timestep changes its own flow and, without a past, that of later frames."""
    text, x = network.text(context), latents((1, 16, 3, 4, 6))

    def flow(*t):
        return network(x, torch.tensor([t]), text, GraphMemory(memory_plan()).view(range(3)))

    first, second = flow(500.0, 500.0, 500.0), flow(500.0, 500.0, 900.0)
    assert (
        (first[:, :, 2] - second[:, :, 2]).abs().max()
        > 10 * (first[:, :, 0] - second[:, :, 0]).abs().max()
        > 0
    )


@torch.no_grad()
def test_a_keys_only_pass_writes_what_a_whole_pass_writes(network, context) -> None:
    text, x, t = network.text(context), latents((1, 16, 3, 4, 6)), torch.zeros(1, 1)
    views = [GraphMemory(memory_plan()).view(range(3)) for _ in range(2)]
    assert network(x, t, text, views[0], keys_only=True) is None
    assert network(x, t, text, views[1]) is not None
    for layer in range(TINY.num_layers):
        assert torch.equal(views[0].new[layer].key, views[1].new[layer].key)
        assert torch.equal(views[0].new[layer].value, views[1].new[layer].value)


def two_predicts(network: CausalWan, x: torch.Tensor, text) -> torch.Tensor:
    """Predict two chunks, committing the first with its graph; return a scalar of both."""
    memory = GraphMemory(memory_plan((1, 16, 2, 2, 2), network.config))
    first = network(x[:, :, :1], torch.full((1, 1), 800.0), text, memory.view([0]))
    network(first, torch.zeros(1, 1), text, memory.view([0]), keys_only=True)
    memory.commit()
    second = network(x[:, :, 1:], torch.full((1, 1), 500.0), text, memory.view([1]))
    return second.square().mean() + first.mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_two_predicts_and_a_commit_equal_finite_differences(
    context, checkpointing
) -> None:
    network = tiny_network(dtype=torch.float64, checkpointing=checkpointing)
    text = network.text(context.double())
    x = latents((1, 16, 2, 2, 2), dtype=torch.float64).requires_grad_()
    weight = network.model.blocks[0].self_attn.v.weight
    two_predicts(network, x, text).backward()

    def difference(tensor: torch.Tensor, place: tuple) -> float:
        step, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                tensor[place] += sign * step
                values.append(two_predicts(network, x, network.text(context.double())).item())
                tensor[place] -= sign * step
        return (values[0] - values[1]) / (2 * step)

    # One place in the first chunk, which the second one sees through memory, and one in the second.
    for place in ((0, 3, 0, 1, 0), (0, 5, 1, 0, 1)):
        assert x.grad[place].item() == pytest.approx(difference(x, place), rel=1e-5, abs=1e-9)
    assert weight.grad[7, 11].item() == pytest.approx(
        difference(weight, (7, 11)), rel=1e-5, abs=1e-9
    )


def test_checkpointing_gives_the_same_gradients_bit_for_bit(context) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = tiny_network(checkpointing=checkpointing)
        two_predicts(network, latents((1, 16, 2, 2, 2)), network.text(context)).backward()
        gradients.append([parameter.grad for parameter in network.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_recomputation_does_not_replace_what_the_graph_holds(context) -> None:
    network = tiny_network(checkpointing=True)
    view = GraphMemory(memory_plan((1, 16, 1, 2, 2))).view([0])
    x = latents((1, 16, 1, 2, 2)).requires_grad_()
    flow = network(x, torch.zeros(1, 1), network.text(context), view)
    written = view.new[0].key
    flow.sum().backward()
    assert view.new[0].key is written


def test_positions_beyond_published_tables_are_exact() -> None:
    like = torch.empty(0, dtype=torch.float64)
    far, near = (rotation_table((start, start + 7), 1, 1, 128, like=like) for start in (100_000, 3))
    assert torch.allclose(far[1] / far[0], near[1] / near[0], atol=1e-9)
    assert axis_pairs(128) == (22, 21, 21)


def test_a_table_made_while_sampling_serves_in_training() -> None:
    """ComfyUI samples under inference_mode, whose tensors cannot be saved for backward."""
    like = torch.empty(0)
    with torch.inference_mode():
        rotation_table((77, 78), 2, 3, 128, like)
    x = torch.randn(1, 12, 1, 128, requires_grad=True)
    rotate(x, rotation_table((77, 78), 2, 3, 128, like)).sum().backward()
    assert x.grad is not None


def test_half_precision_keeps_its_norms_and_timesteps_in_full() -> None:
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).bfloat16() * 30
    norm = RMSNorm(512).bfloat16()
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), exact.bfloat16()), "rounded once, at the end"
    angle = torch.tensor(999.0, dtype=torch.float64)
    assert timestep_features(angle.float(), 256)[0] == torch.cos(angle)


def test_x0_is_computed_in_float64() -> None:
    x, flow = torch.tensor([1e8]), torch.tensor([1e8 - 8.0])
    assert predict_x0(x, flow, 1 - 2**-40).item() == pytest.approx(8.0, rel=1e-3)


def test_wrong_shapes_are_one_clear_line(network, context) -> None:
    text, t = network.text(context), torch.zeros(1, 1)
    view = RingMemory(memory_plan()).view(range(3))
    with pytest.raises(ValueError, match="multiples of 16"):
        network(torch.zeros(1, 16, 3, 5, 6), t, text, view)
    with pytest.raises(ValueError, match=r"expected \[batch, 16"):
        network(torch.zeros(1, 4, 3, 4, 6), t, text, view)
    with pytest.raises(ValueError, match="3 positions"):
        network(torch.zeros(1, 16, 2, 4, 6), t, text, view)
    with pytest.raises(ValueError, match="text encoder"):
        network.text(torch.zeros(1, 8, 33))
    with pytest.raises(ValueError, match="3 heads"):
        WanConfig(dim=128, num_heads=3)


def test_a_cached_tensor_stays_where_somebody_holds_it() -> None:
    made = []

    @cached_tensors(1)
    def ones(count: int) -> torch.Tensor:
        made.append(count)
        return torch.ones(count)

    with torch.inference_mode():
        assert ones(2) is ones(2) and not ones(2).is_inference()
    assert ones(3) is ones(3)
    ones(2)
    assert made == [2, 3, 2], "the least recently used went"
    ones.held = {}
    first = [ones(4), ones(5)]
    assert [ones(4), ones(5)][0] is first[0] and len(ones.held) == 2 and made[3:] == [4, 5]
    ones.held = None
    assert ones(5) is first[1]
