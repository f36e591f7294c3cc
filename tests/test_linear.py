"""The oneDNN linear layer equals torch's."""

import torch
import torch.nn.functional as F

from autorefiner.refiner.wan.linear import Linear, onednn_linear


def test_values_and_gradients_equal_torch_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((2, 5, 24), (40, 24), (40,))
    )
    results = []
    for linear in (F.linear, onednn_linear):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        out = linear(*inputs)
        out.square().sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for ours, reference in zip(*reversed(results), strict=True):
        assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-4)


def test_frozen_weights_get_no_gradient_and_inputs_do() -> None:
    layer = Linear(8, 4).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, -1), atol=1e-6)


def test_other_dtypes_are_left_to_torch() -> None:
    layer = Linear(8, 4).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
