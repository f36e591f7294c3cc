"""The training loop: what a run's folder holds at any time, and what it refuses to go on with."""

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

from autorefiner.refiner import files
from autorefiner.refiner.stopping import handling, interrupt
from autorefiner.refiner.training import loop
from autorefiner.refiner.training.adapters import attach_branches, branch_parameters, pairs_of
from autorefiner.refiner.training.learner import FirstHalf, Learner, LearnerStage
from autorefiner.refiner.training.loop import LoopOptions, Unwatched, restore, save, train

from tiny import tiny_network


def nothing(index: int) -> None: ...


class Line(LearnerStage):
    """Fits weights to one; `at` is called with each step's number, `behind` after its update,
    `drawing` by a sheet."""

    def __init__(self, size: int, at=nothing, behind=nothing, drawing=nothing) -> None:
        self.learner = Learner(nn.ParameterList([torch.zeros(size)]), 0.1, 0.0)
        self.at, self.behind, self.drawing = at, behind, drawing

    def step(self, index: int) -> dict[str, float]:
        self.at(index)
        loss = (self.learner.model[0] - 1).square().mean()
        self.learner.step(loss, index, 1.0)
        self.behind(index)
        return {"loss": loss.item()}

    def show(self, folder: Path, index: int) -> dict[str, float]:
        self.drawing(index)
        (folder / f"sheet_{index:06d}.png").touch()
        return {}


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
    with pytest.raises(ValueError, match="another training") as told:
        restore(Line(3), tmp_path)
    assert "\n" not in str(told.value)
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
    with pytest.raises(OSError, match="could not be written") as told:
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
    with pytest.raises(ValueError, match=r"state\.pt is empty or damaged") as told:
        restore(Line(2), tmp_path)
    assert "\n" not in str(told.value)


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


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard, also where whoever started the tests in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_training_behind_its_step_and_the_second_one_at_once(
    tmp_path, capsys
) -> None:
    def press(times: int):
        return lambda index: [
            os.kill(os.getpid(), signal.SIGINT) for _ in range(times if index == 2 else 0)
        ]

    for times, done in ((1, 3), (2, 2)):
        run = tmp_path / str(times)
        with pytest.raises(KeyboardInterrupt):
            train(Line(2, at=press(times)), LoopOptions(run, 8))
        assert "again to stop now" in capsys.readouterr().err
        assert restore(Line(2), run) == done
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(Line(2), LoopOptions(tmp_path / "1", 8))
    train(Line(2), LoopOptions(tmp_path / "whole", 8))
    rows = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()]
        for name in ("1", "whole")
    ]
    assert rows[0] == rows[1]


class Stopped(BaseException):
    """Ends a training as an interruption by a host does."""


def stopping_at(step: int):
    """A function that ends the training when it is called with a step's number."""

    def stop(index: int, *_: object) -> None:
        if index == step:
            raise Stopped

    return stop


class Follower(Unwatched):
    """A watch whose methods may raise."""

    def __init__(self, **methods) -> None:
        for name, method in methods.items():
            setattr(self, name, method)


def rows(run: Path) -> list[tuple[int, float]]:
    logged = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in logged]


def sheet_at(step: int):
    stop = stopping_at(step)
    return lambda path: stop(int(path.stem.removeprefix("sheet_")))


# Where a training of 8 steps that shows a sheet after each fourth one is ended, and the steps that
# are not lost.
ENDS = {
    "report before a step": ({}, {"report": stopping_at(5)}, 5),
    "report before the first step": ({}, {"report": stopping_at(0)}, 0),
    "report at the end": ({}, {"report": stopping_at(8)}, 8),
    "within a step, before its update": ({"at": stopping_at(5)}, {}, 5),
    "drawing a sheet": ({"drawing": stopping_at(4)}, {}, 4),
    "drawing the last sheet": ({"drawing": stopping_at(8)}, {}, 8),
    "showing a sheet": ({}, {"sheet": sheet_at(4)}, 4),
    "adding figures": ({}, {"add": stopping_at(5)}, 6),
}


@pytest.mark.parametrize("place", ENDS)
def test_no_step_is_lost_wherever_a_training_is_ended(tmp_path, place) -> None:
    stage, watch, done = ENDS[place]
    options, whole = (
        LoopOptions(tmp_path / "run", 8, 100, 4),
        LoopOptions(tmp_path / "whole", 8, 100, 4),
    )
    with pytest.raises(Stopped):
        train(Line(2, **stage), options, Follower(**watch))
    assert restore(Line(2), options.run) == done
    assert [step for step, _ in rows(options.run)] == [*range(done)], "every step has its line once"
    train(Line(2), options)
    train(Line(2), whole)
    assert rows(options.run) == rows(whole.run)
    states = [
        torch.load(each.run / "state.pt", weights_only=True)["stage"] for each in (options, whole)
    ]
    assert torch.equal(*(state["model"]["0"] for state in states))
    assert (options.run / "sheet_000008.png").exists()


class Scored(Line):
    """A stage whose sheets have scores, which are drawn before they are scored."""

    def show(self, folder: Path, index: int) -> dict[str, float]:
        (folder / f"sheet_{index:06d}.png").touch()
        self.drawing(index)
        return {"score": float(index)}


def figures(run: Path) -> list[dict[str, float]]:
    """What each step logged, in the order of the file, without the times."""
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in logged)
    return logged


@pytest.mark.parametrize("place", ["drawing", "sheet"])
@pytest.mark.parametrize("at", [4, 8])
def test_a_sheet_that_was_interrupted_is_logged_with_its_scores(tmp_path, place, at) -> None:
    run, whole = (
        LoopOptions(tmp_path / "run", 8, 100, 4),
        LoopOptions(tmp_path / "whole", 8, 100, 4),
    )
    drawing, methods = (
        (stopping_at(at), {}) if place == "drawing" else (nothing, {"sheet": sheet_at(at)})
    )
    with pytest.raises(Stopped):
        train(Scored(2, drawing=drawing), run, Follower(**methods))
    for options in (run, whole):
        train(Scored(2), options)
    assert figures(run.run) == figures(whole.run)
    assert list(map(list, figures(run.run))) == list(map(list, figures(whole.run))), (
        "in the same order"
    )


def pressing_at(line: int) -> tuple[list[int], object]:
    """How many lines of the loop's own code ran, and a tracer that presses Ctrl-C before one of
    them."""
    ran = [0]

    def trace(frame: FrameType, event: str, _: object) -> object:
        if frame.f_code.co_filename != loop.__file__ or frame.f_code.co_name.lstrip("_") in (
            "lines_before",
            "restore",
        ):
            return None
        if event == "line":
            ran[0] += 1
            if ran[0] == line:
                os.kill(os.getpid(), signal.SIGINT)
        return trace

    return ran, trace


def traced(options: LoopOptions, line: int) -> int:
    """Train until Ctrl-C is pressed before a line of the loop; the lines that ran."""
    ran, trace = pressing_at(line)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with suppress(KeyboardInterrupt):
            train(Scored(2), options)
    finally:
        sys.settrace(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return ran[0]


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_before_any_line_of_the_loop_loses_neither_a_step_nor_its_line(
    tmp_path, monkeypatch
) -> None:
    for slow in ("draw_curve", "os.fsync"):
        monkeypatch.setattr(f"autorefiner.refiner.training.loop.{slow}", lambda *_: None)
    whole = tmp_path / "whole"
    for line in range(1, traced(LoopOptions(whole, 3, 100, 2), 0) + 1):
        run = tmp_path / str(line)
        traced(LoopOptions(run, 3, 100, 2), line)
        lines = figures(run) if (run / "log.jsonl").exists() else []
        assert [row["step"] for row in lines] == [*range(restore(Line(2), run))], line
        train(Scored(2), LoopOptions(run, 3, 100, 2))
        assert figures(run) == figures(whole), line


class TwoUpdates(Line):
    """A step has an update before `between` and one behind it, as that of a critic and of what it
    is for."""

    def __init__(self, between=nothing) -> None:
        super().__init__(2)
        self.between, self.first_half = between, FirstHalf()

    def state_dict(self) -> dict:
        return super().state_dict() | self.first_half.state_dict()

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(
            {name: part for name, part in state.items() if name != "first_half"}
        )
        self.first_half.load_state_dict(state)

    def step(self, index: int) -> dict[str, float]:
        logged = self.first_half.take(index, lambda: Line.step(self, index))
        self.between(index)
        logged["second"] = Line.step(self, index)["loss"]
        self.first_half.clear()
        return logged


def test_a_step_that_ends_between_its_two_updates_goes_on_there(tmp_path) -> None:
    run, whole = LoopOptions(tmp_path / "run", 8), LoopOptions(tmp_path / "whole", 8)
    for at in (3, 5, 5):
        with pytest.raises(Stopped):
            train(TwoUpdates(stopping_at(at)), run)
        assert restore(TwoUpdates(), run.run) == at
    for options in (run, whole):
        train(TwoUpdates(), options)
    assert figures(run.run) == figures(whole.run)
    assert "first_half" not in torch.load(run.run / "state.pt", weights_only=True)["stage"]


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_within_an_update_waits_for_its_end(tmp_path, capsys) -> None:
    stage = Line(2)
    update, calls = stage.learner.optimizer.step, []

    def pressed() -> None:
        calls.append(1)
        for _ in range(2 if len(calls) == 3 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        update()

    stage.learner.optimizer.step = pressed
    with pytest.raises(KeyboardInterrupt):
        train(stage, LoopOptions(tmp_path, 8))
    assert "again to stop now" in capsys.readouterr().err
    assert restore(Line(2), tmp_path) == 3


def test_a_step_that_was_half_taken_is_not_saved(tmp_path) -> None:
    with pytest.raises(Stopped):
        train(Line(2, behind=stopping_at(5)), LoopOptions(tmp_path, 8, save_every=3))
    assert restore(Line(2), tmp_path) == 3


@pytest.mark.parametrize("broken", ["draw_curve", "_Log.write"])
def test_a_file_that_cannot_be_written_loses_no_step(tmp_path, monkeypatch, broken) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(f"autorefiner.refiner.training.loop.{broken}", full)
    with pytest.raises(OSError, match="space"):
        train(Line(2), LoopOptions(tmp_path, 8, save_every=2))
    assert restore(Line(2), tmp_path) == (2 if broken == "draw_curve" else 1)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_sheet_is_drawn_ends_the_training_at_once(tmp_path, number) -> None:
    drawn: list[int] = []

    def press(index: int) -> None:
        os.kill(os.getpid(), number)
        drawn.append(index)

    with pytest.raises(KeyboardInterrupt), handling(interrupt):
        train(Line(2, drawing=press), LoopOptions(tmp_path, 8, 100, 4))
    assert not drawn
    assert restore(Line(2), tmp_path) == 4


def test_an_average_is_read_without_changing_the_factors() -> None:
    """A sheet that is ended in its middle leaves the state as it was."""
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
