"""The training loop: what a run's folder holds at any time, and what it refuses to go on with."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from autorefiner.refiner.training.learner import Learner, LearnerStage
from autorefiner.refiner.training.loop import LoopOptions, restore, save, train


class Line(LearnerStage):
    """Fits weights to one; `at` is called with each step's number."""

    def __init__(self, size: int, at=lambda index: None) -> None:
        self.learner = Learner(nn.ParameterList([torch.zeros(size)]), 0.1, 0.0)
        self.at = at

    def step(self, index: int) -> dict[str, float]:
        self.at(index)
        loss = (self.learner.model[0] - 1).square().mean()
        self.learner.step(loss, index, 1.0)
        return {"loss": loss.item()}

    def show(self, folder: Path, index: int) -> dict[str, float]:
        return {}


def test_a_run_that_goes_on_never_lacks_a_line_of_its_log(tmp_path) -> None:
    train(Line(2), LoopOptions(tmp_path, 3))
    logged = (tmp_path / "log.jsonl").read_text()
    seen = []
    train(Line(2, at=lambda index: seen.append((tmp_path / "log.jsonl").read_text())), LoopOptions(tmp_path, 5))
    assert seen[0] == logged  # before the first new line: what a kill would leave
    assert [json.loads(line)["step"] for line in seen[1].splitlines()] == [0, 1, 2, 3]


def test_a_state_of_another_training_is_refused_in_one_line(tmp_path) -> None:
    train(Line(2), LoopOptions(tmp_path, 1))
    with pytest.raises(ValueError, match=r"holds another training .*: give the options that it was begun with") as told:
        restore(Line(3), tmp_path)
    assert "\n" not in str(told.value)
    assert restore(Line(2), tmp_path) == 1


def full_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / ".state.pt.partial").symlink_to("/dev/full")


def failing_sync(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)


NO_FULL_DISK = pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has one to write to")


@pytest.mark.parametrize("broken", [pytest.param(full_disk, marks=NO_FULL_DISK), failing_sync])
def test_a_full_disk_is_one_line_and_leaves_the_state_before(tmp_path, monkeypatch, broken) -> None:
    train(Line(2), LoopOptions(tmp_path, 1))
    before = (tmp_path / "state.pt").read_bytes()
    broken(tmp_path, monkeypatch)
    with pytest.raises(OSError, match=r"the state could not be written \(.+\): make room, then run the same") as told:
        save(Line(2), tmp_path, 2)
    assert "\n" not in str(told.value)
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
    with pytest.raises(ValueError, match=r"state\.pt is empty or damaged: begin anew in another folder$") as told:
        restore(Line(2), tmp_path)
    assert "\n" not in str(told.value)


def test_a_state_that_was_cut_short_or_is_none_is_not_another_training(tmp_path) -> None:
    path = tmp_path / "state.pt"
    train(Line(2), LoopOptions(tmp_path, 2))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"state\.pt is empty or damaged: begin anew"):
        restore(Line(2), tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"state\.pt is no training's state: begin anew"):
        restore(Line(2), tmp_path)


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": 0, "lo}', '{"step": "0"}'])
def test_a_damaged_line_of_a_log_is_dropped(tmp_path, line) -> None:
    train(Line(2), LoopOptions(tmp_path, 2))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write(line + "\n")
    train(Line(2), LoopOptions(tmp_path, 3))
    assert [json.loads(one)["step"] for one in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_what_a_step_refuses_names_the_step_once(tmp_path) -> None:
    def refuse(index: int) -> None:
        if index == 1:
            raise ValueError("reward x gave 2")

    with pytest.raises(ValueError, match=r"^step 1: reward x gave 2$"):
        train(Line(2, at=refuse), LoopOptions(tmp_path, 3))
    stage = Line(2)
    stage.step = lambda index: {"loss": float("nan")}
    with pytest.raises(ValueError, match=r"^step 0 gave "):
        train(stage, LoopOptions(tmp_path, 3))


def test_a_run_that_has_more_steps_than_asked_for_is_refused(tmp_path) -> None:
    train(Line(2), LoopOptions(tmp_path, 3))
    with pytest.raises(ValueError, match="has taken 3 steps, more than 2: ask for 3 or more"):
        train(Line(2), LoopOptions(tmp_path, 2))
    train(Line(2), LoopOptions(tmp_path, 3))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard, also where whoever started the tests in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_training_behind_its_step_and_the_second_one_at_once(tmp_path, capsys) -> None:
    def press(times: int):
        return lambda index: [os.kill(os.getpid(), signal.SIGINT) for _ in range(times if index == 2 else 0)]

    for times, done in ((1, 3), (2, 0)):
        run = tmp_path / str(times)
        with pytest.raises(KeyboardInterrupt):
            train(Line(2, at=press(times)), LoopOptions(run, 8))
        assert "stopping behind this step, again to stop at once" in capsys.readouterr().err
        assert restore(Line(2), run) == done
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(Line(2), LoopOptions(tmp_path / "1", 8))
    train(Line(2), LoopOptions(tmp_path / "whole", 8))
    rows = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()] for name in ("1", "whole")]
    assert rows[0] == rows[1]
