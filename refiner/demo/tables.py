"""The paper's tables in miniature, on the sprite world: `autorefiner demo tables`.

The learned reward model rewards and chooses, the exact metrics judge. Every trained row has the same budget, and every
difference is paired by caption and seed (AutoRefiner, Tables 1-4, 6 and 7).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import get_args

import numpy as np
import torch

from ..training.options import RefineOptions
from ..training.rewards.reward import Mixture
from .bundle import WEIGHTS, load_sprite_reward
from .captions import Caption
from .clips import LATENT_FRAMES, PRESET, held_out
from .controls import Control, Kind
from .evaluation import Demo
from .metrics.diversity import of_spreads
from .metrics.evaluate import ClipScores
from .metrics.table import Interval, aligned, paired_difference, resampled_interval, summarise
from .rows import Bench, Outcome, Row, Train

TABLES = (1, 2, 3, 4, 6, 7, 8)
TOTALS = ("quality", "semantic", "total")
GAINS = ("semantic", "total")
TOLD_LEVELS = ((750,), (500,), (250,), (500, 250), (750, 250), (750, 500), (750, 500, 250))
RANKS = (16, 32, 64, 128)
BASE = Row("base")
TWO_LEVELS = (1000, 750)
TWO_LEVEL_TABLES = (8,)
CHOSEN_ON, CHOSEN_FROM = 16, 10_000  # captions, and the first of them
# As the student was distilled: the teacher's guidance is its own.
TRAINING = RefineOptions(steps=550, batch=32, accumulation=2, guidance=1.0, shown=16)
# Batches that a CPU core can train in an hour.
TWO_LEVEL_TRAINING = replace(
    TRAINING, preset=PRESET.changed(steps=TWO_LEVELS), levels=TWO_LEVELS[1:],
    steps=320, accumulation=1, ratio=1, critic_warmup=80, critic_rate=2e-4,
)  # fmt: skip
REWARDED = RefineOptions(objective="reward", steps=200, batch=32, accumulation=2, frames=9, shown=8)


@dataclass(frozen=True, slots=True)
class TablesOptions:
    """How much is trained and measured."""

    captions: int = 96
    seeds: int = 2
    frames: int = LATENT_FRAMES
    training: RefineOptions = TRAINING  # by distribution matching
    two_levels: RefineOptions = TWO_LEVEL_TRAINING  # by distribution matching, for a sampler of two levels
    rewarded: RefineOptions = REWARDED
    short: int = 120  # steps of each row of Tables 4 and 6
    tables: tuple[int, ...] = TABLES
    strengths: tuple[float, ...] = (0.03, 0.05, 0.07, 0.1)  # c of the controls, of which the best is chosen
    controls: tuple[tuple[tuple[int, ...], Control], ...] = ()  # the chosen ones, by the sampler's levels

    @classmethod
    def quick(cls) -> "TablesOptions":
        """So little that every number is meaningless: it tries the command."""
        little = dict(steps=2, rank=2, batch=2, accumulation=1, frames=4, ratio=1, critic_warmup=0, shown=1)
        trainings = {
            name: replace(training, **little)
            for name, training in (("training", TRAINING), ("two_levels", TWO_LEVEL_TRAINING), ("rewarded", REWARDED))
        }
        return cls(captions=2, frames=5, short=1, strengths=(), **trainings)


def objective_rows(training: RefineOptions) -> tuple[Row, Row, Row]:
    """The three trained methods of Tables 1 and 2."""
    methods = (("LoRA", "lora"), ("InitNoiseRefiner", "init-noise"), ("AutoRefiner", "autorefiner"))
    return tuple(Row(f"+{name} ({training.objective})", replace(training, method=method)) for name, method in methods)


def control_rows(options: TablesOptions, sampler_levels: tuple[int, ...]) -> list[Row]:
    """Residuals that nothing was trained for, on one sampler."""
    return [
        on_sampler(Row(str(control), control=control), sampler_levels)
        for levels, control in options.controls
        if levels == sampler_levels
    ]


def on_sampler(row: Row, sampler_levels: tuple[int, ...]) -> Row:
    """The row on a sampler with these levels, which its name says where they are not the preset's."""
    if sampler_levels == BASE.sampler_levels:
        return row
    return replace(row, name=f"{row.name} at {' '.join(map(str, sampler_levels))}", sampler_levels=sampler_levels)


def dmd_rows(options: TablesOptions) -> list[Row]:
    """Table 1."""
    return [BASE, *control_rows(options, BASE.sampler_levels), *objective_rows(options.training)]


def two_level_rows(options: TablesOptions) -> list[Row]:
    """Table 8: a sampler with something to gain, and what other samplers make of as many passes or more."""
    samplers = (TWO_LEVELS, (1000, 500), (1000, 750, 500), BASE.sampler_levels)
    base, *others = (on_sampler(BASE, levels) for levels in samplers)
    rows = [*objective_rows(options.two_levels)]
    rows.append(Row(f"{rows[-1].name}, second seed", replace(rows[-1].training, seed=rows[-1].training.seed + 1)))
    trained = (on_sampler(row, TWO_LEVELS) for row in rows)
    return [base, *others, *control_rows(options, TWO_LEVELS), *trained]


def reward_rows(options: TablesOptions) -> list[Row]:
    """Tables 2 and 7."""
    searches = [Row("Best-of-N", search="best-of-n"), Row("Search over Path", search="search-over-path")]
    return [BASE, *searches, *objective_rows(options.rewarded)]


def level_rows(options: TablesOptions) -> list[Row]:
    """Table 3: one refiner, its levels chosen when sampling."""
    return [BASE, *(Row(" ".join(map(str, levels)), options.training, levels) for levels in TOLD_LEVELS)]


def cache_rows(options: TablesOptions) -> list[Row]:
    """Table 4."""
    training = replace(options.training, steps=options.short)
    forms = [(history, previous) for history in ("none", "shared") for previous in ("none", "pending", "joint")]
    return [
        BASE,
        *(
            Row(f"history {history}, previous {previous}", replace(training, history=history, previous=previous))
            for history, previous in forms
        ),
    ]


def rank_rows(options: TablesOptions) -> list[Row]:
    """Table 6; on the head a LoRA has at most its 64 outputs for a rank."""
    training = replace(options.training, steps=options.short)
    return [BASE, *(Row(f"rank {rank}", replace(training, rank=rank)) for rank in RANKS)]


def cost_cells(outcome: Outcome, base: Outcome) -> list[str]:
    """Passes a chunk above the base's, and verifications; frames a second, decode included."""
    cost, chunks = outcome.cost, outcome.chunks
    more = (cost.passes - base.cost.passes) / chunks
    return [f"{more:g}", f"{cost.verifications / chunks:g}", f"{outcome.frames / cost.seconds:.1f}"]


def dynamic_cells(outcome: Outcome, base: Outcome) -> list[str]:
    """Diversity between the seeds of a caption, and dynamic degree."""
    return [str(resampled_interval(outcome.spreads, of_spreads)), str(summarise(outcome.scores)["dynamic"])]


def gains(outcome: Outcome, base: Outcome, captions: int) -> dict[str, Interval]:
    """Of every row of scores, paired by caption and seed; the seeds of a caption are drawn together."""
    groups = [number % captions for number in range(len(outcome.scores))]
    return paired_difference(outcome.scores, base.scores, groups)


@dataclass(frozen=True, slots=True)
class Table:
    """One of the paper's: its rows, and the columns beside the totals."""

    title: str
    rows: Callable[[TablesOptions], Sequence[Row]]
    columns: tuple[str, ...] = ()
    cells: Callable[[Outcome, Outcome], list[str]] = lambda outcome, base: []


KINDS = {
    1: Table("Table 1: trained by distribution matching", dmd_rows, ("ΔNFE",), lambda o, b: cost_cells(o, b)[:1]),
    2: Table(
        "Table 2: trained with the reward model, or searching with it", reward_rows,
        ("ΔNFE", "verifications", "frames/s"), cost_cells,
    ),
    3: Table("Table 3: refined levels, chosen when sampling", level_rows),
    4: Table("Table 4: what the refiner sees", cache_rows, ("ΔNFE",), lambda o, b: cost_cells(o, b)[:1]),
    6: Table("Table 6: the rank of the LoRA", rank_rows),
    7: Table("Table 7: diversity and dynamic degree", reward_rows, ("diversity", "dynamic"), dynamic_cells),
    8: Table(
        "Table 8: a sampler of two levels", two_level_rows, ("ΔNFE", "frames/s", "diversity", "dynamic"),
        lambda o, b: [cost_cells(o, b)[0], cost_cells(o, b)[2], *dynamic_cells(o, b)],
    ),
}  # fmt: skip


def machines(outcomes: dict[str, Outcome]) -> str:
    """A sentence on where rows were trained and measured: on what most were, and which were not; '' if unknown."""
    told = []
    for verb, of in (("trained", lambda one: one.trained_on), ("measured", lambda one: one.measured_on)):
        where = {name: of(outcome) for name, outcome in outcomes.items() if of(outcome)}
        if not where:
            continue
        most = Counter(where.values()).most_common(1)[0][0]
        others: dict[str, list[str]] = {}
        for name, place in where.items():
            if place != most:
                others.setdefault(place, []).append(f"`{name}`")
        more = "".join(f", {', '.join(names)} on {place}" for place, names in others.items())
        told.append(f"{verb} on {most}{more}")
    return f"Rows were {'; they were '.join(told)}." if told else ""


def by_motion(outcome: Outcome, captions: Sequence[Caption]) -> str:
    """A table in Markdown: clips of one object by what it should do, and how often it looks and acts as it should."""
    groups: dict[str, list[ClipScores]] = {}
    for number, scores in enumerate(outcome.scores):
        caption = captions[number % len(captions)]
        if len(caption.objects) == 1:
            (stated,) = caption.objects
            groups.setdefault(stated.motion, []).append(scores)
            for more in (stated.speed, stated.size) if stated.motion == "spin" else ():
                if more:
                    groups.setdefault(f"spin, {more}", []).append(scores)
    lines = [["", "clips", "object", "action"]]
    for name, scores in sorted(groups.items()):
        means = [np.mean([getattr(one, row) for one in scores]) for row in ("object", "action")]
        lines.append([name, str(len(scores)), *(f"{mean:.1f}" for mean in means)])
    return f"### The base's clips of one object, by motion\n\n{aligned(lines)}"


def draw(table: Table, options: TablesOptions, outcomes: dict[str, Outcome]) -> str:
    """A table in Markdown."""
    first, *_ = rows = table.rows(options)
    base, captions = outcomes[first.name], options.captions
    lines = [["", *TOTALS, *(f"{name} less base's" for name in GAINS), *table.columns]]
    for row in rows:
        outcome = outcomes[row.name]
        found = summarise(outcome.scores, [number % captions for number in range(len(outcome.scores))])
        more = gains(outcome, base, captions)
        less = ["–" if row == first else str(more[name]) for name in GAINS]
        lines.append([row.name, *(str(found[name]) for name in TOTALS), *less, *table.cells(outcome, base)])
    return f"### {table.title}\n\n{aligned(lines)}"


def choose_controls(
    bench: Bench, options: TablesOptions, device: torch.device
) -> tuple[tuple[tuple[int, ...], Control], ...]:
    """The best strength of each control for the samplers of Tables 1 and 8, by the total on captions of their own."""
    samplers = {1: BASE.sampler_levels, 8: TWO_LEVELS}
    count = min(CHOSEN_ON, options.captions)
    other = replace(bench, captions=held_out(count, first=CHOSEN_FROM))
    controls = []
    for levels in (samplers[number] for number in options.tables if number in samplers):
        for kind in get_args(Kind):
            totals: dict[Control, float] = {}
            for control in (Control(kind, c) for c in options.strengths):
                row = on_sampler(Row(f"choosing {control}", control=control), levels)
                totals[control] = summarise(other.outcome(row, device).scores)["total"].mean
            if totals:
                controls.append((levels, max(totals, key=totals.get)))
    return tuple(controls)


def how_chosen(options: TablesOptions) -> str:
    """A sentence on the controls; '' where a table has none."""
    if not options.controls:
        return ""
    strengths, count = ", ".join(map(str, options.strengths)), min(CHOSEN_ON, options.captions)
    return f"The c of an untrained residual is the best of {strengths} on {count} other captions. "


def make_tables(
    run: Path, options: TablesOptions, device: torch.device, train: Train, time_again: bool = False
) -> str:
    """Train and measure every row that is not in `run` yet; the tables as a section of RESULTS.md.

    `time_again` is for rows that were measured while the machine was busy with something else.
    """
    run.mkdir(parents=True, exist_ok=True)
    demo = Demo.load(WEIGHTS, device)
    rewards = Mixture(((load_sprite_reward(device=device), 1.0),)) if {2, 7} & {*options.tables} else None
    captions = held_out(options.captions)
    bench = Bench(
        demo, captions, options.seeds, options.frames, run, rewards=rewards, train=train
    )
    options = replace(options, controls=choose_controls(bench, options, device))
    chosen = [KINDS[number] for number in options.tables]
    rows = {row.name: row for table in chosen for row in table.rows(options)}
    outcomes = {name: bench.outcome(row, device) for name, row in rows.items()}
    if time_again:
        timed = [row for row in reward_rows(options) if row.name in rows]
        bench.time_again(timed, device)
        outcomes |= {row.name: bench.outcome(row, device) for row in timed}
    about = f"{describe(options, bench)} {how_chosen(options)}{machines(outcomes)}".strip()
    sections = [draw(table, options, outcomes) for table in chosen]
    if options.tables != TWO_LEVEL_TABLES:
        sections.append(by_motion(outcomes[BASE.name], bench.captions))
    return "\n\n".join((fill(about, 120), *sections))


def describe(options: TablesOptions, bench: Bench) -> str:
    """Describe what was measured and how long each row was trained."""
    only_two_levels = options.tables == TWO_LEVEL_TABLES
    training, rewarded = options.two_levels if only_two_levels else options.training, options.rewarded
    short = "" if only_two_levels else f" (Tables 4 and 6: {options.short})"
    measured = (
        f"{options.captions} held-out captions × {options.seeds} seeds, clips of {4 * options.frames - 3} frames; every"
        " score is 0–100 with its 95 % bootstrap interval over captions, differences are paired by caption and seed."
        f" The base is frozen. By distribution matching (dmd) a row is trained for {training.steps} steps of"
        f" {training.batch * training.accumulation} clips{short}: the fake score learns at all of them, what is tried"
        f" at one in {training.ratio} after the first {training.first_update}."
    )
    if only_two_levels:
        return f"{measured} Rank {training.rank}. ΔNFE: passes a chunk above the base's."
    return (
        f"{measured[:-1]}; by reward for {rewarded.steps} steps of {rewarded.batch * rewarded.accumulation} clips of"
        f" {4 * rewarded.frames - 3} frames. Rank {training.rank}, but in Table 6. ΔNFE: passes a chunk above the"
        " base's; verifications, each of which decodes, are a chunk's too. Both searches choose among"
        f" {bench.candidates} candidates by the learned reward model, which the rewarded rows were trained with; the"
        " exact metrics judge."
    )
