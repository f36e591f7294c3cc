"""Shared fixtures."""

from pathlib import Path

import pytest
import torch

from autorefiner.refiner.wan.causal import CausalWan

from tiny import TINY, tiny_network
from tiny_command import write_files


@pytest.fixture
def network() -> CausalWan:
    return tiny_network()


@pytest.fixture
def context() -> torch.Tensor:
    return torch.randn(1, TINY.text_len, TINY.text_dim, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Write the files of a tiny model; see `tiny_command.write_files`."""
    return write_files(tmp_path_factory.mktemp("files"))
