"""The training loop: its folder at any time, and states that it refuses to resume."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from autorefiner.refiner import files
from autorefiner.refiner.training.adapters import attach_branches, branch_parameters, pairs_of
from autorefiner.refiner.training.loop import LoopOptions, restore, save, train

from tiny import tiny_network
from tiny_stage import Line


def test_a_run_that_goes_on_never_lacks_a_line_of_its_log(tmp_path) -> None:
    train(Line(2), LoopOptions(tmp_path, 3))
    logged = (tmp_path / "log.jsonl").read_text()
    seen = []
    train(
        Line(2, at=lambda index: seen.append((tmp_path / "log.jsonl").read_text())),
        LoopOptions(tmp_path, 5),
    )
    assert seen[0] == logged  # before the first new line: what a kill would leave
    assert [json.loads(line)["step"] for line in seen[1].splitlines()] == [0, 1, 2, 3]


def test_a_state_of_another_training_is_refused_in_one_line(tmp_path) -> None:
    train(Line(2), LoopOptions(tmp_path, 1))
    with pytest.raises(ValueError, match="another training") as error:
        restore(Line(3), tmp_path)
    assert "\n" not in str(error.value)
    assert restore(Line(2), tmp_path) == 1


def full_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / ".state.pt.partial").symlink_to("/dev/full")


def failing_sync(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)


NO_FULL_DISK = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="only Linux has one to write to"
)


@pytest.mark.parametrize("broken", [pytest.param(full_disk, marks=NO_FULL_DISK), failing_sync])
def test_a_full_disk_is_one_line_and_leaves_the_state_before(tmp_path, monkeypatch, broken) -> None:
    train(Line(2), LoopOptions(tmp_path, 1))
    before = (tmp_path / "state.pt").read_bytes()
    broken(tmp_path, monkeypatch)
    with pytest.raises(OSError, match="could not be written") as error:
        save(Line(2), tmp_path, 2)
    assert "\n" not in str(error.value)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not list(tmp_path.glob(".state*"))


def test_a_state_that_cannot_be_saved_leaves_nothing(tmp_path) -> None:
    stage = Line(2)
    stage.state_dict = lambda: {"unsavable": lambda: None}
    with pytest.raises((AttributeError, TypeError)):
        save(stage, tmp_path, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"garbage" * 100], ids=["empty", "garbage"])
def test_a_damaged_state_is_refused_in_one_line(tmp_path, content) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt is empty or damaged") as error:
        restore(Line(2), tmp_path)
    assert "\n" not in str(error.value)


def test_a_state_that_was_cut_short_or_is_none_is_not_another_training(tmp_path) -> None:
    path = tmp_path / "state.pt"
    train(Line(2), LoopOptions(tmp_path, 2))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"state\.pt is empty or damaged"):
        restore(Line(2), tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"state\.pt"):
        restore(Line(2), tmp_path)


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": 0, "lo}', '{"step": "0"}'])
def test_a_damaged_line_of_a_log_is_dropped(tmp_path, line) -> None:
    train(Line(2), LoopOptions(tmp_path, 2))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write(line + "\n")
    train(Line(2), LoopOptions(tmp_path, 3))
    assert [
        json.loads(one)["step"] for one in (tmp_path / "log.jsonl").read_text().splitlines()
    ] == [0, 1, 2]


def test_what_a_step_refuses_names_the_step_once(tmp_path) -> None:
    def refuse(index: int) -> None:
        if index == 1:
            raise ValueError("reward x gave 2")

    with pytest.raises(ValueError, match=r"^step 1: reward x gave 2$"):
        train(Line(2, at=refuse), LoopOptions(tmp_path, 3))
    assert restore(Line(2), tmp_path) == 1, "the step before it is kept"
    stage = Line(2)
    stage.step = lambda index: {"loss": float("nan")}
    with pytest.raises(ValueError, match=r"^step 1 gave "):
        train(stage, LoopOptions(tmp_path, 3))


def test_a_run_that_has_more_steps_than_asked_for_is_refused(tmp_path) -> None:
    train(Line(2), LoopOptions(tmp_path, 3))
    with pytest.raises(ValueError, match="3 steps"):
        train(Line(2), LoopOptions(tmp_path, 2))
    train(Line(2), LoopOptions(tmp_path, 3))


@pytest.mark.parametrize("broken", ["draw_curve", "_Log.write"])
def test_a_file_that_cannot_be_written_loses_no_step(tmp_path, monkeypatch, broken) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(f"autorefiner.refiner.training.loop.{broken}", full)
    with pytest.raises(OSError, match="space"):
        train(Line(2), LoopOptions(tmp_path, 8, save_every=2))
    assert restore(Line(2), tmp_path) == (2 if broken == "draw_curve" else 1)


def test_an_average_is_read_without_changing_the_factors() -> None:
    """A sheet that is interrupted leaves the state unchanged."""
    base = tiny_network()
    tree = attach_branches(base, 2, silent_head=True)
    factors = branch_parameters(tree)
    before = {name: factor.detach().clone() for name, factor in factors.items()}
    pairs = pairs_of(tree, {name: torch.full_like(factor, 2) for name, factor in factors.items()})
    assert all((pair.down == 2).all() and (pair.up == 2).all() for pair in pairs.values())
    assert all(torch.equal(factor, before[name]) for name, factor in factors.items())
    assert torch.equal(
        pairs_of(tree)["blocks.0.ffn.0"].down, before["blocks.0.ffn.0.lora_A.default.weight"]
    )


@pytest.mark.skipif(files.fcntl is None, reason="no locks here")
@pytest.mark.filterwarnings("ignore:.*file locks")
def test_a_training_goes_on_where_there_are_no_locks(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    for steps in (2, 4):
        train(Line(2), LoopOptions(tmp_path, steps))
    assert restore(Line(2), tmp_path) == 4
