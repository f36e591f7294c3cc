"""A training in two processes: the losses and the refiner of one, and it goes on from what both have saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autorefiner.refiner.cli import main
from autorefiner.refiner.training.distributed import check_torch, load_shards

from tiny_bundle import use_bundle, write_tiny_bundle

pytest.importorskip("peft")

INNER = {
    "dmd": 'batch = 4\nratio = 1\nprevious = "joint"\ncheckpointing = true',
    "reward": 'batch = 2\naccumulation = 2\nobjective = "reward"\n[[rewards]]\nkind = "sprites"',
}


def write(folder: Path, name: str, steps: int, objective: str) -> Path:
    """A training's file; all steps of one name share a run."""
    path = folder / f"{name}_{steps}.toml"
    path.write_text(
        f'out = "{name}.safetensors"\nrun = "{name}_run"\nsave_every = 2\nshow_every = 3\n[refiner]\nsteps = {steps}\n'
        f'rank = 3\nframes = 4\nshown = 1\nprecision = "fp32"\nlearning_rate = 1e-3\n{INNER[objective]}\n'
    )
    return path


def test_an_older_torch_trains_in_one_process_alone() -> None:
    for version in ("2.9.0", "2.13.0+cpu", "3.0.1"):
        check_torch(version)
    for version in ("2.7.1+cu126", "2.8.0"):
        with pytest.raises(ValueError, match="several processes"):
            check_torch(version)


def rows_of(run: Path) -> list[dict]:
    """What the steps logged; a distance is of all noises together, and no mean of the processes'."""
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    shown = ("seconds", "object", "colour", "action", "quality", "total")
    return [{n: v for n, v in row.items() if n not in shown and "distance" not in n} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder where two processes have trained for both objectives; the first training was ended and gone on with."""
    try:
        check_torch(torch.__version__)
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("two")
    write_tiny_bundle(folder / "models")
    trainings = [("dmd", 2), ("dmd", 3), ("reward", 3)]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("tiny_bundle.py")), str(folder / "models")]
    command += [str(write(folder, f"two_{objective}", steps, objective)) for objective, steps in trainings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = [str(folder / f"two_{objective}.safetensors") for objective, _ in trainings]
    assert done.stdout.split() == expected  # the first process speaks alone
    return folder


@pytest.mark.parametrize("objective", ["dmd", "reward"])
def test_two_processes_train_as_one(trained, monkeypatch, objective) -> None:
    use_bundle(trained / "models", monkeypatch.setattr)
    assert main(["train", str(write(trained, f"one_{objective}", 3, objective)), "--device", "cpu"]) == 0
    found, expected = (rows_of(trained / f"{name}_{objective}_run") for name in ("two", "one"))
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for left, right in zip(found, expected, strict=True):
        assert left == {name: pytest.approx(value, rel=2e-4, abs=1e-6) for name, value in right.items()}
    left, right = (load_file(trained / f"{name}_{objective}.safetensors") for name in ("two", "one"))
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[name].float(), right[name].float(), atol=2e-3) for name in left)

    run = trained / f"two_{objective}_run"
    assert [path.name for path in run.glob("state*")] == ["state_00000003"]
    assert (run / "sheet_000003.png").exists()


def test_a_run_goes_on_as_it_was_begun(tmp_path, monkeypatch, capsys) -> None:
    models = tmp_path / "models"
    write_tiny_bundle(models)
    use_bundle(models, monkeypatch.setattr)
    (tmp_path / "one_run" / "state_00000001").mkdir(parents=True)
    assert main(["train", str(write(tmp_path, "one", 3, "dmd")), "--device", "cpu"]) == 2
    assert "several processes" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads here
def test_a_damaged_shard_is_told_in_one_line(tmp_path) -> None:
    (tmp_path / "state_000003").mkdir()
    (tmp_path / "state_000003" / ".metadata").write_bytes(b"no metadata")
    with pytest.raises(ValueError, match="state_000003"):
        load_shards({"weight": torch.zeros(2)}, tmp_path)
