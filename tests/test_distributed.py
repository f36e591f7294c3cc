"""Training in two processes equals training in one, and resumes from what both saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autorefiner.refiner.cli import main
from autorefiner.refiner.training.distributed import check_torch, load_shards

from tiny_bundle import start_forkserver, train_in_processes, use_bundle, write_tiny_bundle

pytest.importorskip("peft")

INNER = {
    "dmd": 'batch = 2\nratio = 1\nprevious = "joint"\ncheckpointing = true',
    "reward": 'batch = 2\naccumulation = 2\nobjective = "reward"\n[[rewards]]\nkind = "sprites"',
}
FRAMES = {"dmd": 4, "reward": 3}  # two chunks and one


def write(folder: Path, name: str, steps: int, objective: str) -> Path:
    """Write a training's TOML; all steps of one name share a run."""
    path = folder / f"{name}_{steps}.toml"
    path.write_text(
        f'out = "{name}.safetensors"\nrun = "{name}_run"\nsave_every = 2\nshow_every = 2\n'
        f"[refiner]\nsteps = {steps}\nrank = 3\nframes = {FRAMES[objective]}\nshown = 1\n"
        f'precision = "fp32"\nlearning_rate = 1e-3\n{INNER[objective]}\n'
    )
    return path


def test_an_older_torch_trains_in_one_process_alone() -> None:
    for version in ("2.9.0", "2.13.0+cpu", "3.0.1"):
        check_torch(version)
    for version in ("2.7.1+cu126", "2.8.0"):
        with pytest.raises(ValueError, match="several processes"):
            check_torch(version)


def rows_of(run: Path) -> list[dict]:
    """Return the log's rows, less figures that differ between runs or are no means.

    Left out are times, the sheet's scores, comparisons with the step before, and figures over all
    noises together, which are not means over the processes.
    """
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    left_out = (
        "seconds",
        "signal",
        "object",
        "colour",
        "action",
        "quality",
        "total",
        "distance",
        "rms",
        "constant",
    )
    return [
        {name: value for name, value in row.items() if name.split()[0] not in left_out}
        for row in rows
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of tiny models; from here on processes are forked after the imports."""
    try:
        check_torch(torch.__version__)
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("two")
    write_tiny_bundle(folder / "models")
    start_forkserver()
    return folder


def test_a_run_goes_on_as_it_was_begun(folder, tmp_path, monkeypatch, capsys) -> None:
    use_bundle(folder / "models", monkeypatch.setattr)
    (tmp_path / "one_run" / "state_00000001").mkdir(parents=True)
    assert main(["train", str(write(tmp_path, "one", 3, "dmd")), "--device", "cpu"]) == 2
    assert "several processes" in capsys.readouterr().err


def train_two(folder: Path, objective: str, steps: int) -> None:
    """Train in two processes up to a step."""
    config = write(folder, f"two_{objective}", steps, objective)
    assert train_in_processes(folder / "models", [config], 2, folder) == [0, 0], (
        folder / "err_1"
    ).read_text()[-4000:]
    assert (folder / "out_0").read_text() == f"{folder}/two_{objective}.safetensors\n"
    assert not (folder / "out_1").read_text()  # only the first process prints


@pytest.fixture(scope="module")
def begun(folder) -> Path:
    """Return the folder after two processes took a first step with DMD."""
    train_two(folder, "dmd", 1)
    return folder


def test_each_process_writes_its_shard_of_a_state(begun) -> None:
    (state,) = (begun / "two_dmd_run").glob("state*")
    assert state.name == "state_00000001"
    assert len([*state.glob("*.distcp")]) == 2


@pytest.fixture(scope="module", params=["dmd", "reward"])
def objective(begun, request) -> str:
    """Train in two processes; with DMD, resume from what both saved."""
    train_two(begun, request.param, 2)
    return request.param


def test_two_processes_train_as_one(begun, monkeypatch, objective) -> None:
    use_bundle(begun / "models", monkeypatch.setattr)
    assert (
        main(["train", str(write(begun, f"one_{objective}", 2, objective)), "--device", "cpu"]) == 0
    )
    found, expected = (rows_of(begun / f"{name}_{objective}_run") for name in ("two", "one"))
    found[0].pop("held-out", None)  # from the sheet at the end of the first run
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for left, right in zip(found, expected, strict=True):
        assert left == {
            name: pytest.approx(value, rel=2e-4, abs=1e-6) for name, value in right.items()
        }
    left, right = (load_file(begun / f"{name}_{objective}.safetensors") for name in ("two", "one"))
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[name].float(), right[name].float(), atol=2e-3) for name in left)

    run = begun / f"two_{objective}_run"
    assert [path.name for path in run.glob("state*")] == ["state_00000002"]
    assert (run / "sheet_000002.png").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads here
def test_a_damaged_shard_is_told_in_one_line(tmp_path) -> None:
    (tmp_path / "state_000003").mkdir()
    (tmp_path / "state_000003" / ".metadata").write_bytes(b"no metadata")
    with pytest.raises(ValueError, match="state_000003"):
        load_shards({"weight": torch.zeros(2)}, tmp_path)
