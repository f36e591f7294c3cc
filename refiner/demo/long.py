"""Clips longer than the trained length, by memory: `autorefiner demo long`."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from numpy import ndarray

from ..choices import choose
from ..memory.policies import POLICIES
from ..noise.source import VERSION as NOISE_VERSION
from ..run_plan import RunPlan, suggested
from ..sample import sample
from ..schedule import Preset
from ..training.ahead import helpers
from .bundle import FILES, REFINERS, WEIGHTS, bundled_refiner
from .captions import Caption
from .clips import LATENT_FRAMES, PRESET, SIDE, batched, decoded, held_out, score
from .evaluation import Demo
from .metrics.evaluate import ClipScores
from .metrics.joins import join_flicker
from .metrics.table import aligned, paired_difference, resampled_interval, summarise
from .rows import machine, weights_of

SHOWN = ("total", "drift", "action")
TIMED = 4  # clips that a chunk is timed on


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """A memory as users choose it; None: the preset's or the policy's own.

    `refined` adds the bundled refiner.
    """

    name: str
    memory: str = "window"
    window: int | None = None
    sink: int | None = None
    positions: str | None = None
    refined: bool = False

    @property
    def preset(self) -> Preset:
        """The preset of a run with it."""
        preset = suggested(PRESET, choose(self.memory, POLICIES, "memory"))
        return preset.changed(window=self.window, sink=self.sink, positions=self.positions)

    def plan(self, frames: int, batch: int) -> RunPlan:
        """Plan a run with it."""
        policy = choose(self.memory, POLICIES, "memory")
        return RunPlan(self.preset, frames, SIDE, SIDE, batch, policy=policy)


RELATIVE = MemoryRow("window 21, relative", window=LATENT_FRAMES, sink=0, positions="relative")
WITH_REFINER = ", refined"  # ends the name of a row that is compared with the one without
ROWS = (
    MemoryRow("full history"),
    MemoryRow("window 12", window=12, sink=0),
    MemoryRow("window 12, sink 3", window=12, sink=3),
    RELATIVE,
    replace(RELATIVE, name=RELATIVE.name + WITH_REFINER, refined=True),
    MemoryRow("window 12, sink 3, relative", window=12, sink=3, positions="relative"),
    MemoryRow("ema-sink", memory="ema-sink"),
    MemoryRow("deep-sink", memory="deep-sink"),
    MemoryRow("top-frames", memory="top-frames"),
)


@dataclass(frozen=True, slots=True)
class LongOptions:
    """The sizes of a measurement: pairs of a multiple of the trained length and captions."""

    lengths: tuple[tuple[int, int], ...] = ((4, 32), (16, 16))


@dataclass(frozen=True, slots=True)
class LongOutcome:
    """The measurements of one row at one length."""

    scores: list[ClipScores]
    joins: list[float]  # flicker between chunks, 0-100
    memory_bytes: int  # of one clip
    milliseconds: float  # a chunk of TIMED clips, median of the second half
    measured_on: str
    timed_on: str = ""  # where it was timed again


def long_videos(
    folder: Path, options: LongOptions, device: torch.device, again: bool = False
) -> str:
    """Measure what is missing; return a section of RESULTS.md without its heading.

    Each row's measurement stays in `folder`, so an interrupted command resumes with the next one.
    With `again`, all rows are timed anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo.load(WEIGHTS, device)
    parts = [INTRODUCTION]
    for times, captions in options.lengths:
        outcomes = {
            row.name: measured(folder, demo, row, times, held_out(captions), device, again)
            for row in ROWS
        }
        frames = 1 + 4 * (times * LATENT_FRAMES - 1)
        parts += [
            f"### {times} times the trained length: {frames:,} frames, {captions} captions",
            format_outcomes(outcomes),
        ]
    return "\n\n".join(parts)


INTRODUCTION = fill(
    "Clips of 64x64 pixels longer than the 81 frames that the base was trained on. Rows are without"
    " a refiner unless they say so. Every score is 0–100, higher is better, with its 95 % bootstrap"
    " interval over captions; `less full` is the total less that of full history, paired by"
    " caption. `joins` scores flicker in the frames beside two chunks' join alone. K/V is what one"
    f" clip's memory takes, ms a chunk the median time to sample one chunk of {TIMED} clips, over"
    " the second half of a run.",
    width=120,
)


def measured(
    folder: Path, demo: Demo, row: MemoryRow, times: int, captions: Sequence[Caption],
    device: torch.device, again: bool = False,
) -> LongOutcome:  # fmt: skip
    """Return a row's measurement, read from the folder if it is there, and timed `again`."""
    files = [FILES[name] for name in ("student", "vae", "text")]
    if row.refined:
        files.append(REFINERS["sprites"])
    weights = [weights_of(WEIGHTS / file).hex() for file in files]
    preset = row.preset
    memory = row.memory, preset.window, preset.sink, preset.positions
    key = repr((NOISE_VERSION, memory, times, len(captions), weights))
    path = folder / f"{row.name.replace(', ', '-').replace(' ', '-')}-{times}.json"
    if path.exists() and (document := json.loads(path.read_text()))["key"] == key:
        del document["key"]
        scores = [ClipScores(**scores) for scores in document.pop("scores")]
        outcome = LongOutcome(scores, **document)
        if not again:
            return outcome
        milliseconds = time_chunks(demo, row, times, captions, device)
        outcome = replace(outcome, milliseconds=milliseconds, timed_on=machine(device))
    else:
        outcome = measure(demo, row, times, captions, device)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps({"key": key, **asdict(outcome)}))
    temporary.replace(path)
    return outcome


def measure(
    demo: Demo, row: MemoryRow, times: int, captions: Sequence[Caption], device: torch.device
) -> LongOutcome:
    """Sample, decode and score a clip of each caption."""
    frames, joins = times * LATENT_FRAMES, []
    refiner = bundled_refiner(demo.student, WEIGHTS) if row.refined else None
    lengths = row.plan(frames, 1).lengths

    def clips() -> Iterator[ndarray]:
        for number, texts in enumerate(batched(captions)):
            plan = row.plan(frames, len(texts))
            chunks = sample(demo.student, demo.text(texts), plan, seed=number, refiner=refiner)
            for clip in decoded(demo.vae, torch.cat(list(chunks), dim=2)):
                joins.append(join_flicker(clip, lengths))
                yield clip

    scores = score(clips(), captions, f"{row.name}, {times} times", helpers(device))
    dtype = next(demo.student.model.parameters()).dtype
    nbytes = row.plan(frames, 1).memory_bytes(demo.student.config, dtype)
    milliseconds = time_chunks(demo, row, times, captions, device)
    return LongOutcome(scores, joins, nbytes, milliseconds, machine(device))


def time_chunks(
    demo: Demo, row: MemoryRow, times: int, captions: Sequence[Caption], device: torch.device
) -> float:
    """Return the median milliseconds of a chunk of TIMED clips, over the second half of a run."""
    texts = [caption.text for caption in captions[:TIMED]]
    refiner = bundled_refiner(demo.student, WEIGHTS) if row.refined else None
    plan = row.plan(times * LATENT_FRAMES, len(texts))
    ends = []
    for _ in sample(demo.student, demo.text(texts), plan, refiner=refiner):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
    took = np.diff(ends)
    return 1000 * float(np.median(took[len(took) // 2 :]))


def format_outcomes(outcomes: dict[str, LongOutcome]) -> str:
    """Format rows as a Markdown table."""
    base, *_ = outcomes.values()
    lines = [["memory", *SHOWN, "joins", "less full", "K/V", "ms a chunk"]]
    for name, outcome in outcomes.items():
        summary = summarise(outcome.scores)
        gain = paired_difference(outcome.scores, base.scores)["total"]
        joins = resampled_interval(np.array(outcome.joins), np.mean)
        lines.append([
            name, *(str(summary[row]) for row in SHOWN), str(joins),
            "–" if outcome is base else str(gain),
            f"{outcome.memory_bytes / 2**20:.1f} MiB", f"{outcome.milliseconds:.0f}",
        ])  # fmt: skip
    machines = sorted({outcome.measured_on for outcome in outcomes.values()})
    timing = sorted({outcome.timed_on or outcome.measured_on for outcome in outcomes.values()})
    timed = f", timed on {' and '.join(timing)}" if timing != machines else ""
    gained = "".join(map(partial(describe_gain, outcomes), outcomes))
    return f"{aligned(lines)}\n\n{gained}Measured on {' and '.join(machines)}{timed}."


def describe_gain(outcomes: dict[str, LongOutcome], name: str) -> str:
    """Describe what the refiner of a row gains on the row without; "" for a row without."""
    if not name.endswith(WITH_REFINER):
        return ""
    plain = name.removesuffix(WITH_REFINER)
    gain = paired_difference(outcomes[name].scores, outcomes[plain].scores)
    rows = ", ".join(f"{row} {gain[row]}" for row in ("total", "drift"))
    return f"`{name}` less `{plain}`, paired by caption: {rows}. "
