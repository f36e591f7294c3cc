"""The public Self-Forcing implementation's recorded tensors, one test a case."""

from pathlib import Path

import pytest

from autorefiner.refiner.memory.stores import STORES

from golden_cases import (
    config_of,
    distance,
    forward_outputs,
    golden_files,
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


@pytest.mark.parametrize("path", cases("vae"))
def test_golden_vae(path: Path) -> None:
    for ours, recorded in vae_outputs(path):
        assert distance(ours, recorded) <= 1e-4
