"""The training loop of every stage: seeded, logged, and continued by the same command after any
kind of end."""

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
    """Have glibc reuse big blocks of this process instead of returning each to the kernel.

    Fetching them anew, page by page, takes up to half of the time of a CPU training. Nothing is
    done elsewhere.
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
        """Take one optimisation step; returns what is logged, `loss` first."""
        ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def allocate(self) -> None:
        """Of a stage that several processes train: make every tensor of the state."""
        ...

    def show(self, folder: Path, index: int) -> dict[str, float]:
        """Write a sample sheet into the run's folder; returns scores to log."""
        ...


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How long, and how often what is written."""

    run: Path
    steps: int
    save_every: int = 100
    show_every: int = 500

    def __post_init__(self) -> None:
        if min(self.steps, self.save_every, self.show_every) < 1:
            raise ValueError(
                f"steps {self.steps}, save {self.save_every}, show {self.show_every}: give at least 1"
            )

    def saves(self, done: int) -> bool:
        """Whether the state is saved after `done` steps."""
        return done % self.save_every == 0 or done == self.steps

    def shows(self, done: int) -> bool:
        """Whether a sample sheet is drawn after `done` steps."""
        return done % self.show_every == 0 or done == self.steps


class Watch(Protocol):
    """What follows a training, and may end it by raising."""

    def report(self, done: int) -> None:
        """So many steps are taken."""
        ...

    def add(self, index: int, figures: Mapping[str, float]) -> None:
        """Take what a step logged."""
        ...

    def sheet(self, path: Path) -> None:
        """A sample sheet was written."""
        ...


class Unwatched:
    """Nobody follows the training but its bar and its log."""

    def report(self, done: int) -> None: ...

    def add(self, index: int, figures: Mapping[str, float]) -> None: ...

    def sheet(self, path: Path) -> None: ...


def train(stage: Stage, options: LoopOptions, watch: Watch | None = None) -> None:
    """Train to `options.steps`, from where the run in `options.run` stands.

    The folder gets the state, log.jsonl (a line a step), loss.png and the stage's sample sheets; of
    several processes the first one writes the latter. Whatever ends it, steps that were taken are
    saved first, and the same call goes on behind them. Raises ValueError at the first loss that is
    not finite, what was saved before stays; for what a step refuses, with its number; and for a
    folder that another training writes. OSError where the disk is full.
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
            f"{options.run} has taken {start} steps, more than {options.steps}: ask for {start} or more, or train in"
            " another folder"
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
    """Draw the sample sheet after `done` steps and log its scores. One that is not scored is not
    left behind."""
    path = sheet_path(run, done)
    try:
        logged |= stage.show(run, done)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if path.exists():
        watch.sheet(path)


def _show_again(stage: Stage, run: Path, done: int, watch: Watch, lines: "_Log") -> None:
    """Draw a sheet whose drawing was interrupted."""
    scores: dict[str, float] = {}
    try:
        show(stage, run, done, watch, scores)
    finally:
        lines.complete(done - 1, scores)


def sheet_path(run: Path, done: int) -> Path:
    """The sample sheet after `done` steps."""
    return run / f"sheet_{done:06d}.png"


class _Steps:
    """The steps that a stage has taken. Whatever ends the training between two updates, none of
    them is lost.

    Ctrl-C and SIGTERM end it after the step that is being taken, the second one at once. Of several
    processes, in a thread, or where somebody else handles the signals, they stay what they are.
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
        else:  # within an update, which is short
            call_later(self._ask, SOON)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a first signal wait for the end of what is done here."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Take a step. One that ends by an error does not count; what its updates changed is not
        saved."""
        mark_whole()
        with self.waiting():
            yield
            self.taken += 1
            mark_whole()

    def save(self) -> None:
        """Save the state after the steps that were taken."""
        save(self.stage, self.run, self.taken)
        self.saved = self.taken


def _step(stage: Stage, index: int) -> dict[str, float]:
    """What the step logs. What it refuses, as a reward out of its range, names the step: the log
    ends before it."""
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
    """A line a step in a file, and a bar; for a path of None neither."""

    def __init__(self, path: Path | None, start: int, steps: int) -> None:
        self.path = path
        self.pending: tuple[int, dict[str, float], float] | None = (
            None  # step, figures, when it began
        )
        if path is not None:
            self._begin(read_rows(path, start))
            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def _begin(self, rows: list[Row]) -> None:
        """Go on behind these rows. The file is whole at any time, so that a kill loses no line."""
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
        """Add the scores of a sheet to the last line, if it is that of step `index`."""
        if self.path is None or not scores:
            return
        rows = read_rows(self.path, index + 1)
        if rows and rows[-1]["step"] == index:
            seconds = {"seconds": rows[-1].pop("seconds", 0.0)}
            self.file.close()
            self._begin([*rows[:-1], {**rows[-1], **scores, **seconds}])

    def write(self) -> None:
        """Write the line of the step that was taken, unless it is there."""
        if self.path is None or self.pending is None:
            return
        (index, logged, began), self.pending = self.pending, None
        seconds = round(time.perf_counter() - began, 3)
        self.file.write(format_row({"step": index, **logged, "seconds": seconds}))
        self.file.flush()
        self.bar.update()
        self.bar.set_postfix_str(", ".join(f"{name} {value:.4f}" for name, value in logged.items()))


def save(stage: Stage, run: Path, done: int) -> None:
    """Replace the run's state by the stage's; of several processes each writes its part.

    OSError where it cannot be written: the state before stays, and nothing of the new one.
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
            f"{run}: the state could not be written ({reason}): make room, then run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)  # what failed is left of it


def restore(stage: Stage, run: Path) -> int:
    """Bring the stage to the run's saved state; returns the number of steps taken, 0 for a new run.

    ValueError for a run of one process that several go on with, and the other way round, for a
    state that is damaged, and for one that is not of this stage's tensors.
    """
    path, shards = run / "state.pt", saved_shards(run)
    if shards if world() == 1 else path.exists():
        begun, now = ("several processes", "one") if world() == 1 else ("one process", "several")
        raise ValueError(
            f"{run} was begun by {begun}, not {now}: go on as it was begun, or train in another folder"
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
        said = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{run} holds another training ({said}): give the options that it was begun with, or another folder"
        ) from error


def _read(path: Path) -> dict:
    """A saved state; ValueError for a file that is none, or not whole."""
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
