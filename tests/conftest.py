"""Fixtures that several tests share."""

import pytest
import torch

from autorefiner.refiner.wan.causal import CausalWan

from tiny import TINY, tiny_network


@pytest.fixture
def network() -> CausalWan:
    return tiny_network()


@pytest.fixture
def context() -> torch.Tensor:
    return torch.randn(1, TINY.text_len, TINY.text_dim, generator=torch.Generator().manual_seed(1))
