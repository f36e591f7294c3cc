"""Linear layers that multiply in fp8: numbers and scales, errors of a product and of a network."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autorefiner.refiner.memory.whole import WholeClip
from autorefiner.refiner.noise.refiner import merged
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.fp8_linear import (
    CONVERTED,
    Fp8Linear,
    fp8_layer,
    multiplies_fp8,
    quantise,
    scaled_product,
    with_fp8,
)

from tiny import TINY, tiny_network
from tiny_refiner import pairs_for

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rows_are_scaled_so_that_their_largest_value_is_448() -> None:
    """Row 0: scale 7 / 448 = 1/64; 1 is 64 then, and 1.05 is 67.2, which rounds to 64 or 72."""
    numbers, scale = quantise(
        torch.tensor([[7.0, -1.0, 1.05], [0.0, 0.0, 0.0], [-448e30, 0, 2e30]])
    )
    assert torch.equal(scale[[0, 2], 0], torch.tensor([1 / 64, 1e30]))
    expected = torch.tensor([[448.0, -64, 64], [0, 0, 0], [-448, 0, 2]])
    assert torch.equal(numbers.float(), expected)
    assert 0 < scale[1, 0] < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_as_near_as_four_digits_allow(dtype) -> None:
    """A number is off by at most 1/16 of itself, or 2^-10 scales; the result is in bf16."""
    weight, bias, x = random(48, 32), random(48, seed=1), random(2, 5, 32, seed=2).to(dtype)
    weight[3], x[1, 2] = 0, 0
    weight[4] *= 1e4
    x[0, 1] *= 1e-4
    layer = Fp8Linear(weight, nn.Parameter(bias.to(dtype)))
    y, exact = layer(x), x.double() @ weight.double().t()
    assert (y.shape, y.dtype) == ((2, 5, 48), dtype)

    def spread(values: Tensor) -> tuple[Tensor, Tensor]:
        size = values.double().abs()
        return size, size / 16 + size.amax(-1, keepdim=True) / 448 / 1024

    (size_x, error_x), (size_w, error_w) = spread(x), spread(weight)
    bound = error_x @ size_w.t() + (size_x + error_x) @ error_w.t()
    total = exact + bias.to(dtype)
    assert ((y - total).abs() <= bound + (exact.abs() + bound + total.abs()) / 128).all()
    assert torch.equal(y[1, 2], bias.bfloat16().to(dtype)), "a token of zeros"
    assert torch.equal(y[..., 3], bias[3].bfloat16().to(dtype).expand(2, 5)), "a row of zeros"
    assert (y - total).norm() > 1e-3 * total.norm(), "it is quantised"


def test_a_value_that_is_not_finite_stays_so_in_its_token() -> None:
    x = random(3, 32)
    x[1, 5] = float("inf")
    y = Fp8Linear(random(16, 32), None)(x)
    assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()


def test_the_fp8_kernel_takes_what_a_layer_gives_it() -> None:
    """A GPU's shapes and strides, checked without one."""
    assert not multiplies_fp8(CPU)
    with FakeTensorMode():
        tokens, weight = (torch.empty(rows, 32, device="cuda") for rows in (96, 64))
        operands = *quantise(tokens), *quantise(weight)
        y = scaled_product(*operands)
    assert (y.shape, y.dtype) == ((96, 64), torch.bfloat16)
    numbers, scale = quantise(random(32, 96).t())
    assert numbers.is_contiguous() and scale.t().is_contiguous()


def test_sizes_that_the_kernel_does_not_take_are_multiplied_without_it(monkeypatch) -> None:
    module = "autorefiner.refiner.wan.fp8_linear"
    monkeypatch.setattr(f"{module}.multiplies_fp8", lambda device: True)
    assert Fp8Linear(random(48, 32), None).is_fast
    assert not Fp8Linear(random(40, 32), None).is_fast
    assert not Fp8Linear(random(48, 24), None).is_fast
    monkeypatch.setattr(f"{module}.multiplies_fp8", lambda device: False)
    assert not Fp8Linear(random(48, 32), None).is_fast


@torch.no_grad()
def flow_of(network: CausalWan) -> Tensor:
    dtype = next(network.model.parameters()).dtype
    x, context = random(1, 16, 2, 4, 4).to(dtype), random(1, TINY.text_len, TINY.text_dim).to(dtype)
    return network(x, torch.full((1, 1), 500.0), network.text(context), WholeClip(2)).float()


def layers_of(network: CausalWan) -> dict[str, nn.Module]:
    return dict(network.model.named_modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_in_fp8_is_near_the_plain_one(dtype) -> None:
    plain = tiny_network(dtype=dtype)
    before, converted = flow_of(plain), with_fp8(plain)
    error = (flow_of(converted) - before).norm() / before.norm()
    assert 1e-3 < error < 5e-2
    assert torch.equal(flow_of(plain), before), "the network itself stays as it was"


def test_the_products_of_the_blocks_are_converted_and_all_else_is_shared() -> None:
    plain = tiny_network()
    converted = with_fp8(plain)
    fp8 = {name for name, layer in layers_of(converted).items() if isinstance(layer, Fp8Linear)}
    products = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"]
    products += ["cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"]
    assert fp8 == {f"blocks.{block}.{name}" for block in range(2) for name in products}
    before, after = layers_of(plain), layers_of(converted)
    leaves = [name for name, layer in before.items() if not any(layer.children())]
    assert all(after[name] is before[name] for name in leaves if name not in fp8)
    assert all(after[name].bias is before[name].bias for name in fp8)
    again = with_fp8(converted)
    assert all(again_layer is after[name] for name, again_layer in layers_of(again).items())


def test_a_merged_refiner_is_converted_after_or_while_it_is_merged() -> None:
    base = tiny_network()
    pairs = pairs_for(base)
    plain = merged(base, pairs)
    after, meanwhile = with_fp8(plain), with_fp8(merged(base, pairs, convert=fp8_layer))
    assert torch.equal(flow_of(after), flow_of(meanwhile))
    error = (flow_of(after) - flow_of(plain)).norm() / flow_of(plain).norm()
    assert 1e-3 < error < 5e-2
    fp8_base = layers_of(with_fp8(base))
    same = [name for name, layer in layers_of(after).items() if layer is fp8_base[name]]
    assert {"patch_embedding", "text_embedding.0", "blocks.1.norm3"} <= set(same)
    assert not any(CONVERTED.fullmatch(name) for name in same)
