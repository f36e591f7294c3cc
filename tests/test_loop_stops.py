"""Stopping a training: no step, no log line and no sheet is lost, wherever it happens."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
import torch

from autorefiner.refiner.stopping import handling, interrupt
from autorefiner.refiner.training import loop
from autorefiner.refiner.training.learner import FirstHalf
from autorefiner.refiner.training.loop import LoopOptions, Unwatched, restore, train

from tiny_stage import Line, nothing


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Handle Ctrl-C even where the tests run in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_training_behind_its_step_and_the_second_one_at_once(
    tmp_path, capsys
) -> None:
    def press(times: int):
        return lambda index: [
            signal.raise_signal(signal.SIGINT) for _ in range(times if index == 2 else 0)
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
    """Raised to end a training, as a host's interruption is."""


def stopping_at(step: int):
    """Return a callback that raises Stopped at the given step."""

    def stop(index: int, *_: object) -> None:
        if index == step:
            raise Stopped

    return stop


class Follower(Unwatched):
    """A watch with replaceable methods."""

    def __init__(self, **methods) -> None:
        for name, method in methods.items():
            setattr(self, name, method)


def rows(run: Path) -> list[tuple[int, float]]:
    logged = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in logged]


def sheet_at(step: int):
    stop = stopping_at(step)
    return lambda path: stop(int(path.stem.removeprefix("sheet_")))


# Where a training of 8 steps with a sheet every 4 is stopped: (arguments of Line, methods of
# Follower, steps that are saved).
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
    """A stage whose sheets have scores, returned after the drawing."""

    def show(self, folder: Path, index: int) -> dict[str, float]:
        (folder / f"sheet_{index:06d}.png").touch()
        self.drawing(index)
        return {"score": float(index)}


def figures(run: Path) -> list[dict[str, float]]:
    """Return the rows of a run's log without their times, in order."""
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
    """Return a line counter and a tracer that presses Ctrl-C before the given line of loop.py."""
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
                signal.raise_signal(signal.SIGINT)
        return trace

    return ran, trace


def traced(options: LoopOptions, line: int) -> int:
    """Train with Ctrl-C before the given line of the loop; return the number of lines run."""
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
    """A stage with two updates a step, as of critic and generator; `between` runs in between."""

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
            signal.raise_signal(signal.SIGINT)
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


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_sheet_is_drawn_ends_the_training_at_once(tmp_path, number) -> None:
    drawn: list[int] = []

    def press(index: int) -> None:
        signal.raise_signal(number)
        drawn.append(index)

    with pytest.raises(KeyboardInterrupt), handling(interrupt):
        train(Line(2, drawing=press), LoopOptions(tmp_path, 8, 100, 4))
    assert not drawn
    assert restore(Line(2), tmp_path) == 4
