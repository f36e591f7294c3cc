"""The public Self-Forcing implementation's recorded tensors, one test a case."""

from pathlib import Path

import pytest
import torch

from autorefiner.refiner.memory.stores import STORES

from golden_cases import (
    config_of,
    distance,
    forward_outputs,
    golden_files,
    relative_distance,
    rollout_outputs,
    rollout_preset,
    vae_outputs,
)


def cases(*kinds: str) -> list:
    return [
        pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in golden_files(*kinds)
    ]


@pytest.mark.parametrize("path", cases("forward"))
def test_golden_forward(path: Path) -> None:
    outputs = forward_outputs(path)
    assert len(outputs) > 2
    for ours, recorded in outputs:
        assert distance(ours, recorded) <= 2e-5


@pytest.mark.parametrize(("store", "tolerance"), [("plain", 2e-5), ("int8", 2e-2)])
@pytest.mark.parametrize("path", cases("rollout"))
def test_golden_rollout(path: Path, store: str, tolerance: float) -> None:
    config = config_of(path)
    levels = rollout_preset(config).chunk_levels()
    assert [level.t for level in levels] == pytest.approx(config["timesteps"], abs=1e-4)
    assert distance(*rollout_outputs(path, store=STORES[store])) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", cases("forward"))
def test_golden_forward_in_fp8(path: Path, dtype: torch.dtype) -> None:
    """A wrong scale of one layer is off by far more, a layer left out by less."""
    errors = [relative_distance(*pair) for pair in forward_outputs(path, dtype=dtype, fp8=True)]
    assert 1e-2 < max(errors) < 5e-2


@pytest.mark.parametrize("path", cases("rollout"))
def test_golden_rollout_in_fp8(path: Path) -> None:
    assert 3e-3 < relative_distance(*rollout_outputs(path, fp8=True)) < 1e-2


@pytest.mark.parametrize("path", cases("vae"))
def test_golden_vae(path: Path) -> None:
    for ours, recorded in vae_outputs(path):
        assert distance(ours, recorded) <= 1e-4
