"""The training loop of every stage: seeded, logged, and resumed by the same command."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from ..files import open_exclusive
from ..stopping import SOON, call_later, handling, interrupt, settle
from ..terminal import warn
from ..wan.torch_file import load_torch
from .curve import draw_curve
from .distributed import is_first, load_shards, save_shards, saved_shards, world
from .learner import is_whole, mark_whole
from .log import Row, format_row, read_rows

RUNS = Path.home() / ".cache" / "autorefiner" / "runs"


def keep_freed_memory() -> None:
    """Make glibc reuse large freed blocks instead of returning them to the kernel.

    Page faults on fresh blocks take up to half of a CPU training's time. A no-op outside glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            never_mapped, never_trimmed = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(*never_mapped)
            mallopt(*never_trimmed)


class Stage(Protocol):
    """One model in training. A step must depend on nothing but the saved state and its index."""

    def step(self, index: int) -> dict[str, float]:
        """Take one optimisation step; returns the figures to log, `loss` first."""
        ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def allocate(self) -> None:
        """Allocate every tensor of the state; needed only for training in several processes."""
        ...

    def show(self, folder: Path, index: int) -> dict[str, float]:
        """Write a sample sheet into the run's folder; returns scores to log."""
        ...


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """The length of a training, and how often state and sample sheets are written."""

    run: Path
    steps: int
    save_every: int = 100
    show_every: int = 500

    def __post_init__(self) -> None:
        if min(self.steps, self.save_every, self.show_every) < 1:
            given = f"steps {self.steps}, save {self.save_every}, show {self.show_every}"
            raise ValueError(f"{given}: give at least 1")

    def saves(self, done: int) -> bool:
        """Return whether the state is saved after `done` steps."""
        return done % self.save_every == 0 or done == self.steps

    def shows(self, done: int) -> bool:
        """Return whether a sample sheet is drawn after `done` steps."""
        return done % self.show_every == 0 or done == self.steps


class Watch(Protocol):
    """Callbacks during a training; each may end it by raising."""

    def report(self, done: int) -> None:
        """Handle the number of steps taken."""
        ...

    def add(self, index: int, figures: Mapping[str, float]) -> None:
        """Handle a step's figures."""
        ...

    def sheet(self, path: Path) -> None:
        """Handle a new sample sheet."""
        ...


class Unwatched:
    """A watch that does nothing."""

    def report(self, done: int) -> None: ...

    def add(self, index: int, figures: Mapping[str, float]) -> None: ...

    def sheet(self, path: Path) -> None: ...


def train(stage: Stage, options: LoopOptions, watch: Watch | None = None) -> None:
    """Train to `options.steps`, resuming the run in `options.run`.

    Writes the state, log.jsonl (one line per step), loss.png and sample sheets into that folder;
    of several processes the first writes all but the state. However the training ends, the steps
    taken are saved, and the same call resumes after them. ValueError, with the last saved state
    intact, for a figure that is not finite, an error in a step (with its number), or a folder that
    another training is writing; OSError if the disk is full.
    """
    options.run.mkdir(parents=True, exist_ok=True)
    watch = watch or Unwatched()
    if not is_first():
        _train(stage, options, None, watch)
        return
    with open_exclusive(options.run / "lock", "wait for it, or train in another folder"):
        _train(stage, options, options.run / "log.jsonl", watch)


def _train(stage: Stage, options: LoopOptions, log: Path | None, watch: Watch) -> None:
    start = restore(stage, options.run)
    if start > options.steps:
        raise ValueError(
            f"{options.run} has taken {start} steps, more than {options.steps}:"
            f" ask for {start} or more, or train in another folder"
        )
    with _Steps(stage, options.run, start) as steps, _Log(log, start, options.steps) as lines:
        if start and options.shows(start) and not sheet_path(options.run, start).exists():
            _show_again(stage, options.run, start, watch, lines)
        for index in range(start, options.steps):
            began = time.perf_counter()
            with steps.taking():
                watch.report(index)
                logged = _step(stage, index)
                lines.pending = index, logged, began
            if options.shows(steps.taken):
                show(stage, options.run, steps.taken, watch, logged)
            with steps.waiting():
                lines.write()
            watch.add(index, logged)
            if options.saves(steps.taken) or steps.asked:
                steps.save()
                if log is not None:
                    draw_curve(log, options.run / "loss.png")
            if steps.asked and steps.taken < options.steps:
                raise KeyboardInterrupt
    watch.report(options.steps)


def show(stage: Stage, run: Path, done: int, watch: Watch, logged: dict[str, float]) -> None:
    """Draw the sample sheet after `done` steps and log its scores; delete it if that fails."""
    path = sheet_path(run, done)
    try:
        logged |= stage.show(run, done)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if path.exists():
        watch.sheet(path)


def _show_again(stage: Stage, run: Path, done: int, watch: Watch, lines: "_Log") -> None:
    """Draw a sheet that an earlier call did not complete."""
    scores: dict[str, float] = {}
    try:
        show(stage, run, done, watch, scores)
    finally:
        lines.complete(done - 1, scores)


def sheet_path(run: Path, done: int) -> Path:
    """Return the path of the sample sheet after `done` steps."""
    return run / f"sheet_{done:06d}.png"


class _Steps:
    """Counts a stage's steps and saves them when the training ends between two updates.

    Ctrl-C and SIGTERM end the training after the current step, a second signal at once. Handlers
    are left alone in several processes, outside the main thread, or if others are installed.
    """

    def __init__(self, stage: Stage, run: Path, taken: int) -> None:
        self.stage, self.run = stage, run
        self.taken = self.saved = taken
        self.waits = self.asked = False
        others = () if world() > 1 else (signal.default_int_handler, interrupt)
        self.handled = handling(self._ask, instead_of=others) if others else nullcontext()

    def __enter__(self) -> "_Steps":
        self.handled.__enter__()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        settle()
        self.waits = kind is not None
        try:
            if kind is not None and is_whole() and self.taken > self.saved and world() == 1:
                self.save()
        finally:
            self.handled.__exit__(kind, *error)

    def _ask(self, *_: object) -> None:
        first, self.asked = not self.asked, True
        if not self.waits:
            interrupt()
        if first:
            warn("stopping after this step (Ctrl-C again to stop now)")
        elif is_whole():
            interrupt()
        else:  # in the middle of an update, which is short
            call_later(self._ask, SOON)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Defer a first signal to the end of the block."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Count the step taken in the block; one that raises does not count and is not saved."""
        mark_whole()
        with self.waiting():
            yield
            self.taken += 1
            mark_whole()

    def save(self) -> None:
        """Save the state after the steps taken so far."""
        save(self.stage, self.run, self.taken)
        self.saved = self.taken


def _step(stage: Stage, index: int) -> dict[str, float]:
    """Take a step; ValueErrors, as of a reward out of range, and infinite figures name it."""
    try:
        logged = stage.step(index)
    except ValueError as error:
        raise ValueError(f"step {index}: {error}") from error
    if not all(map(_finite, logged.values())):
        raise ValueError(
            f"step {index} gave {logged}: lower the learning rate; the state before is kept"
        )
    return logged


class _Log:
    """Writes a line per step to a file and updates a progress bar; neither if the path is None."""

    def __init__(self, path: Path | None, start: int, steps: int) -> None:
        self.path = path
        # step, figures, start time
        self.pending: tuple[int, dict[str, float], float] | None = None
        if path is not None:
            self._begin(read_rows(path, start))
            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def _begin(self, rows: list[Row]) -> None:
        """Rewrite the file with these rows, atomically, and append from there on."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(map(format_row, rows)))
        os.replace(partial, self.path)
        self.file = open(self.path, "a")  # noqa: SIM115, closed at the end

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is None:
            return
        try:
            self.write()
        finally:
            self.bar.close()
            self.file.close()

    def complete(self, index: int, scores: dict[str, float]) -> None:
        """Add a sheet's scores to the last line, if it is that of step `index`."""
        if self.path is None or not scores:
            return
        rows = read_rows(self.path, index + 1)
        if rows and rows[-1]["step"] == index:
            seconds = {"seconds": rows[-1].pop("seconds", 0.0)}
            self.file.close()
            self._begin([*rows[:-1], {**rows[-1], **scores, **seconds}])

    def write(self) -> None:
        """Write the pending line, if there is one."""
        if self.path is None or self.pending is None:
            return
        (index, logged, began), self.pending = self.pending, None
        seconds = round(time.perf_counter() - began, 3)
        self.file.write(format_row({"step": index, **logged, "seconds": seconds}))
        self.file.flush()
        self.bar.update()
        self.bar.set_postfix_str(", ".join(f"{name} {value:.4f}" for name, value in logged.items()))


def save(stage: Stage, run: Path, done: int) -> None:
    """Replace the run's saved state; each of several processes writes its shards.

    OSError if it cannot be written; the previous state then stays, and no partial file.
    """
    if world() > 1:
        save_shards(stage.state_dict(), run, done)
        return
    state, temporary = {"done": done, "stage": stage.state_dict()}, run / ".state.pt.partial"
    try:
        torch.save(state, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, run / "state.pt")
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{run}: the state could not be written ({reason}):"
            " make room, then run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def restore(stage: Stage, run: Path) -> int:
    """Load the run's saved state into the stage; returns the steps taken, 0 for a new run.

    ValueError if the state is damaged, holds other tensors than this stage, or was written by one
    process and is read by several, or vice versa.
    """
    path, shards = run / "state.pt", saved_shards(run)
    if shards if world() == 1 else path.exists():
        begun, now = ("several processes", "one") if world() == 1 else ("one process", "several")
        raise ValueError(
            f"{run} was begun by {begun}, not {now}:"
            " go on as it was begun, or train in another folder"
        )
    if not shards and not path.exists():
        return 0
    state = None if world() > 1 else _read(path)
    try:
        if state is None:
            return _restore_shards(stage, run)
        stage.load_state_dict(state["stage"])
        return state["done"]
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{run} holds another training ({reason}):"
            " give the options that it was begun with, or another folder"
        ) from error


def _read(path: Path) -> dict:
    """Read a saved state; ValueError for a damaged file or one that holds something else."""
    try:
        state = load_torch(path, verify=True)
    except ValueError as error:
        raise ValueError(f"{path} is empty or damaged: begin anew in another folder") from error
    whole = isinstance(state, dict) and isinstance(state.get("stage"), dict)
    if not whole or type(state.get("done")) is not int or state["done"] < 0:
        raise ValueError(f"{path} is no training's state: begin anew in another folder")
    return state


def _restore_shards(stage: Stage, run: Path) -> int:
    stage.allocate()
    state = stage.state_dict()
    done = load_shards(state, run)
    stage.load_state_dict(state)
    return done


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
