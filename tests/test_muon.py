"""Muon equals torch's, with matrix products in the dtype of the machine."""

import pytest
import torch
from torch import nn

if not hasattr(torch.optim, "Muon"):
    pytest.skip("this torch has no Muon to compare with", allow_module_level=True)

from autorefiner.refiner.training import muon, precision
from autorefiner.refiner.training.learner import Learner


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator))
        for shape in ((8, 24), (24, 8), (8, 24), (5, 5))
    ]


def gradients(index: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + index)
    return [torch.randn(parameter.shape, generator=generator) for parameter in matrices()]


@pytest.mark.parametrize("bf16", [True, False])
def test_steps_equal_those_of_torch(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps on matrices of several shapes; torch multiplies in bf16, hence the tolerance."""
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: bf16)
    ours, reference = matrices(), matrices()
    options = dict(lr=0.02, weight_decay=0.1)
    optimizers = [muon.Muon(ours, **options), torch.optim.Muon(reference, **options)]
    for index in range(3):
        for parameters, optimizer in zip((ours, reference), optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients(index), strict=True):
                parameter.grad = gradient
            optimizer.step()
    for one, other, start in zip(ours, reference, matrices(), strict=True):
        assert torch.allclose(one, other, atol=2e-3)
        assert not torch.allclose(one, start, atol=2e-2)


def test_singular_values_come_near_one() -> None:
    stack = torch.randn(3, 12, 30, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.svdvals(
        muon.orthogonalised(stack, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    )
    assert found.min() > 0.5 and found.max() < 1.4


@pytest.mark.parametrize("asked", ["bf16", "fp32"])
@pytest.mark.parametrize("supported", [True, False])
def test_products_are_cast_only_where_the_device_has_them(
    asked, supported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: supported)
    layer = nn.Linear(4, 4)
    with precision.mixed_precision(torch.device("cpu"), asked):
        made = layer(torch.ones(2, 4))
    assert made.dtype == (torch.bfloat16 if asked == "bf16" and supported else torch.float32)


def test_a_parameter_without_a_gradient_stays() -> None:
    layer = nn.Linear(6, 6)
    learner = Learner(layer, 1e-3, 0.0, muon=1e-2)
    before = layer.weight.clone()
    learner.zero_grad()
    learner.update(0, 1.0)
    assert torch.equal(layer.weight, before)


def test_spared_matrices_are_not_muons() -> None:
    model = nn.ModuleDict({"v": nn.Linear(6, 6), "k": nn.Linear(6, 6)})
    learner = Learner(model, 1e-3, 0.0, muon=1e-2, spared=("v.",))
    assert [parameter.data_ptr() for parameter in learner.optimizer.matrices] == [
        model["k"].weight.data_ptr()
    ]
    model["v"](torch.ones(2, 6)).sum().backward()
    before = model["v"].weight.clone()
    learner.update(0, 1.0)
    assert not torch.equal(model["v"].weight, before)
