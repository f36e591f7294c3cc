"""The paper's tables in miniature, on the sprite world: `autorefiner demo tables`.

The learned reward model rewards and chooses, the exact metrics judge. All trained rows have the
same budget; differences are paired by caption and seed (AutoRefiner, Tables 1-4, 6 and 7).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill

import numpy as np
import torch

from ..training.options import RefineOptions
from ..training.rewards.reward import Mixture
from .bundle import WEIGHTS, load_sprite_reward
from .captions import Caption, Stated
from .clips import LATENT_FRAMES, PRESET, held_out
from .controls import Control, Kind
from .evaluation import Demo
from .metrics.diversity import of_spreads
from .metrics.evaluate import ClipScores
from .metrics.table import Interval, aligned, paired_difference, resampled_interval, summarise
from .rows import Bench, Outcome, Row, Train

DMD_TABLES, REWARD_TABLES, TWO_LEVEL_TABLES = (1, 3, 4, 6), (2, 7), (8,)
TABLES = tuple(sorted(DMD_TABLES + REWARD_TABLES + TWO_LEVEL_TABLES))
SECTIONS = {  # of RESULTS.md
    "The refiner": DMD_TABLES,
    "The refiner, by reward": REWARD_TABLES,
    "A sampler of two levels": TWO_LEVEL_TABLES,
}
TOTALS = ("quality", "semantic", "total")
GAINS = ("semantic", "drift", "dynamic", "total")
LEVEL_CHOICES = ((750,), (500,), (250,), (500, 250), (750, 250), (750, 500), (750, 500, 250))
RANKS = (16, 32, 64, 128)
CANDIDATES = (2, 5)  # of the searches
BASE = Row("base")
TWO_LEVELS = (1000, 750)
CHOSEN: tuple[Kind, ...] = ("shrunk", "towards x0", "hand-made")  # controls whose c is chosen
CHOSEN_ON, CHOSEN_FROM = 16, 10_000  # captions to choose it on: their number, the first one
# Guided as the student's distillation. Takes a CPU core fifty minutes with --compile.
TRAINING = RefineOptions(
    steps=240, batch=32, accumulation=1, ratio=1, critic_warmup=80, critic_rate=2e-4, guidance=1.0,
    shown=16,
)  # fmt: skip
# The same, which takes half an hour.
TWO_LEVEL_TRAINING = replace(
    TRAINING, preset=PRESET.changed(levels=TWO_LEVELS), levels=TWO_LEVELS[1:]
)
# Whole clips, from the hand-made residual that gains most, at a low rate: 1e-3 raised the reward
# and lowered the total. Takes a CPU core a quarter of an hour with --compile.
REWARDED = RefineOptions(
    objective="reward", start="flow", previous="joint", steps=80, batch=16, accumulation=1,
    learning_rate=2e-4, shown=16,
)  # fmt: skip


Controls = tuple[tuple[tuple[int, ...], Control], ...]  # sampler's levels and control


@dataclass(frozen=True, slots=True)
class TablesOptions:
    """The sizes of trainings and measurements."""

    captions: int = 96
    seeds: int = 2
    frames: int = LATENT_FRAMES
    training: RefineOptions = TRAINING  # by distribution matching
    two_levels: RefineOptions = TWO_LEVEL_TRAINING  # the same, for a sampler of two levels
    rewarded: RefineOptions = REWARDED
    short: int = 120  # steps of each row of Tables 4 and 6
    tables: tuple[int, ...] = TABLES
    strengths: tuple[float, ...] = (0.03, 0.05, 0.07, 0.1)  # candidates for a control's c
    controls: Controls = ()  # chosen by choose_controls

    @classmethod
    def quick(cls) -> "TablesOptions":
        """Return options that only try the command; all numbers are meaningless."""
        little = dict(
            steps=2, rank=2, batch=2, accumulation=1, frames=4, ratio=1, critic_warmup=0, shown=1
        )  # fmt: skip
        return cls(
            captions=2,
            frames=5,
            training=replace(TRAINING, **little),
            two_levels=replace(TWO_LEVEL_TRAINING, **little),
            rewarded=replace(REWARDED, **little),
            short=1,
            strengths=(),
        )


def objective_rows(training: RefineOptions) -> tuple[Row, Row, Row]:
    """Return rows of the three trained methods of Tables 1 and 2."""
    methods = (("LoRA", "lora"), ("InitNoiseRefiner", "init-noise"), ("AutoRefiner", "autorefiner"))
    return tuple(
        Row(f"+{name} ({training.objective})", replace(training, method=method))
        for name, method in methods
    )


def with_second_seed(rows: Sequence[Row]) -> list[Row]:
    """Append the last row's training anew with another seed."""
    last = rows[-1]
    training = replace(last.training, seed=last.training.seed + 1)
    return [*rows, Row(f"{last.name}, second seed", training)]


def control_rows(options: TablesOptions, sampler_levels: tuple[int, ...]) -> list[Row]:
    """Return the controls' rows on one sampler."""
    return [
        on_sampler(Row(str(control), control=control), sampler_levels)
        for levels, control in options.controls
        if levels == sampler_levels
    ]


def on_sampler(row: Row, sampler_levels: tuple[int, ...]) -> Row:
    """Return the row on a sampler with these levels, named unless they are the preset's."""
    if sampler_levels == BASE.sampler_levels:
        return row
    name = f"{row.name} at {' '.join(map(str, sampler_levels))}"
    return replace(row, name=name, sampler_levels=sampler_levels)


def start_rows(training: RefineOptions) -> list[Row]:
    """Return a row of the residual that trained rows start from, unless it is zero."""
    if training.start != "flow":
        return []
    control = Control("hand-made", training.flow_share, training.previous)
    return [Row(f"untrained, {control}", control=control)]


def dmd_rows(options: TablesOptions) -> list[Row]:
    """Return the rows of Table 1."""
    controls = control_rows(options, BASE.sampler_levels)
    trained = with_second_seed(objective_rows(options.training))
    return [BASE, *controls, *start_rows(options.training), *trained]


def two_level_rows(options: TablesOptions) -> list[Row]:
    """Return the rows of Table 8: two levels, and samplers with as many passes or more."""
    samplers = (TWO_LEVELS, (1000, 500), (1000, 750, 500), BASE.sampler_levels)
    base, *others = (on_sampler(BASE, levels) for levels in samplers)
    rows = with_second_seed(objective_rows(options.two_levels))
    trained = (on_sampler(row, TWO_LEVELS) for row in rows)
    return [base, *others, *control_rows(options, TWO_LEVELS), *trained]


def reward_rows(options: TablesOptions) -> list[Row]:
    """Return the rows of Tables 2 and 7."""
    searches = [
        Row(f"{name}, N = {count}", search=search, candidates=count)
        for name, search in (("Best-of-N", "best-of-n"), ("Search over Path", "search-over-path"))
        for count in CANDIDATES
    ]
    repeated = Row("P&P", sampler="self-refine")  # as many passes as a refiner's
    trained = objective_rows(options.rewarded)
    return [BASE, repeated, *searches, *start_rows(options.rewarded), *trained]


def level_rows(options: TablesOptions) -> list[Row]:
    """Return the rows of Table 3: one refiner, with its levels chosen when sampling."""
    return [
        BASE,
        *(Row(" ".join(map(str, levels)), options.training, levels) for levels in LEVEL_CHOICES),
    ]


def cache_rows(options: TablesOptions) -> list[Row]:
    """Return the rows of Table 4: what the refiner sees."""
    short = replace(options.training, steps=options.short)
    rows = [BASE]
    for history in ("none", "shared"):
        for previous in ("none", "pending", "joint"):
            training = replace(short, history=history, previous=previous)
            rows.append(Row(f"history {history}, previous {previous}", training))
    return rows


def rank_rows(options: TablesOptions) -> list[Row]:
    """Return the rows of Table 6; the final layer's rank is 64 in all of them."""
    training = replace(options.training, steps=options.short)
    return [BASE, *(Row(f"rank {rank}", replace(training, rank=rank)) for rank in RANKS)]


def caption_numbers(scores: Sequence[ClipScores], captions: int) -> list[int]:
    """Return the caption's number of each clip; clips are seed by seed."""
    return [number % captions for number in range(len(scores))]


def gains(outcome: Outcome, base: Outcome, captions: int) -> dict[str, Interval]:
    """Return every score's gain over the base, paired by caption and seed, resampled by caption."""
    groups = caption_numbers(outcome.scores, captions)
    return paired_difference(outcome.scores, base.scores, groups)


Cell = Callable[[Outcome, Outcome, int], str]  # of a row, the base and the number of captions


def passes_cell(outcome: Outcome, base: Outcome, captions: int) -> str:
    """Format the passes a chunk above the base's."""
    return f"{(outcome.cost.passes - base.cost.passes) / outcome.chunks:g}"


def verifications_cell(outcome: Outcome, base: Outcome, captions: int) -> str:
    """Format the verifications a chunk."""
    return f"{outcome.cost.verifications / outcome.chunks:g}"


def speed_cell(outcome: Outcome, base: Outcome, captions: int) -> str:
    """Format the frames a second, with decoding."""
    return f"{outcome.frames / outcome.cost.seconds:.1f}"


def diversity_cell(outcome: Outcome, base: Outcome, captions: int) -> str:
    """Format the diversity over a caption's seeds."""
    return str(resampled_interval(outcome.spreads, of_spreads))


def dynamic_cell(outcome: Outcome, base: Outcome, captions: int) -> str:
    """Format the dynamic degree."""
    return str(summarise(outcome.scores, caption_numbers(outcome.scores, captions))["dynamic"])


COLUMNS: dict[str, Cell] = {  # besides scores
    "ΔNFE": passes_cell,
    "verifications": verifications_cell,
    "frames/s": speed_cell,
    "diversity": diversity_cell,
    "dynamic": dynamic_cell,
}


@dataclass(frozen=True, slots=True)
class Table:
    """One of the paper's tables: its rows, and names of COLUMNS."""

    title: str
    rows: Callable[[TablesOptions], Sequence[Row]]
    columns: tuple[str, ...] = ()


KINDS = {
    1: Table(
        "Table 1: trained by distribution matching", dmd_rows, ("ΔNFE", "diversity", "dynamic")
    ),
    2: Table(
        "Table 2: trained with the reward model, or searching with it",
        reward_rows,
        ("ΔNFE", "verifications", "frames/s"),
    ),
    3: Table("Table 3: refined levels, chosen when sampling", level_rows),
    4: Table("Table 4: what the refiner sees", cache_rows, ("ΔNFE",)),
    6: Table("Table 6: the rank of the LoRA", rank_rows),
    7: Table("Table 7: diversity and dynamic degree", reward_rows, ("diversity", "dynamic")),
    8: Table(
        "Table 8: a sampler of two levels",
        two_level_rows,
        ("ΔNFE", "frames/s", "diversity", "dynamic"),
    ),
}


def machines(outcomes: dict[str, Outcome]) -> str:
    """Describe the machines that rows were trained, measured and timed on; "" if unknown."""
    clauses = []
    for verb in ("trained", "measured", "timed"):
        places = {name: getattr(outcome, f"{verb}_on") for name, outcome in outcomes.items()}
        places = {name: place for name, place in places.items() if place}
        if places:
            clauses.append(f"{verb} on {by_place(places)}")
    return f"Rows were {'; they were '.join(clauses)}." if clauses else ""


def by_place(places: dict[str, str]) -> str:
    """List the machine of most rows, then the others with their rows."""
    most = Counter(places.values()).most_common(1)[0][0]
    others: dict[str, list[str]] = {}
    for name, place in places.items():
        if place != most:
            others.setdefault(place, []).append(f"`{name}`")
    exceptions = (f"{', '.join(names)} on {place}" for place, names in others.items())
    return ", ".join([most, *exceptions])


def motion_groups(stated: Stated) -> list[str]:
    """Return an object's groups: its motion, and for a spin also its speed and size."""
    details = (stated.speed, stated.size) if stated.motion == "spin" else ()
    return [stated.motion, *(f"spin, {detail}" for detail in details if detail)]


def by_motion(outcome: Outcome, captions: Sequence[Caption]) -> str:
    """Format the object and action scores of one-object clips by motion as a Markdown table."""
    groups: dict[str, list[ClipScores]] = {}
    for number, scores in enumerate(outcome.scores):
        caption = captions[number % len(captions)]
        if len(caption.objects) != 1:
            continue
        for name in motion_groups(caption.objects[0]):
            groups.setdefault(name, []).append(scores)
    lines = [["", "clips", "object", "action"]]
    for name, scores in sorted(groups.items()):
        means = [np.mean([getattr(clip, row) for clip in scores]) for row in ("object", "action")]
        lines.append([name, str(len(scores)), *(f"{mean:.1f}" for mean in means)])
    return f"### The base's clips of one object, by motion\n\n{aligned(lines)}"


def draw(table: Table, options: TablesOptions, outcomes: dict[str, Outcome]) -> str:
    """Format a table of the rows with an outcome in Markdown."""
    rows = [row for row in table.rows(options) if row.name in outcomes]
    base, captions = outcomes[rows[0].name], options.captions
    lines = [["", *TOTALS, *(f"{name} less base's" for name in GAINS), *table.columns]]
    for row in rows:
        outcome = outcomes[row.name]
        summary = summarise(outcome.scores, caption_numbers(outcome.scores, captions))
        totals = [str(summary[name]) for name in TOTALS]
        gained = gains(outcome, base, captions)
        differences = ["–" if row == rows[0] else str(gained[name]) for name in GAINS]
        cells = [COLUMNS[name](outcome, base, captions) for name in table.columns]
        lines.append([row.name, *totals, *differences, *cells])
    return f"### {table.title}\n\n{aligned(lines)}"


def choose_controls(bench: Bench, options: TablesOptions, device: torch.device) -> Controls:
    """Choose each control's strength for the samplers of Tables 1 and 8, on separate captions."""
    samplers = {1: BASE.sampler_levels, 8: TWO_LEVELS}
    count = min(CHOSEN_ON, options.captions)
    other = replace(bench, captions=held_out(count, first=CHOSEN_FROM))
    controls = []
    for levels in (samplers[number] for number in options.tables if number in samplers):
        for kind in CHOSEN:
            totals: dict[Control, float] = {}
            for control in (Control(kind, c) for c in options.strengths):
                row = on_sampler(Row(f"choosing {control}", control=control), levels)
                totals[control] = summarise(other.outcome(row, device).scores)["total"].mean
            if totals:
                best = max(totals, key=totals.get)
                controls.append((levels, best))
    return tuple(controls)


def how_chosen(options: TablesOptions) -> str:
    """Describe how the controls were chosen; "" if there are none."""
    if not options.controls:
        return ""
    strengths = ", ".join(map(str, options.strengths))
    count = min(CHOSEN_ON, options.captions)
    return f"The c of an untrained residual is the best of {strengths} on {count} other captions. "


def make_tables(
    run: Path, options: TablesOptions, device: torch.device, train: Train | None,
    time_again: bool = False,
) -> str:  # fmt: skip
    """Train and measure missing rows; returns the tables as a section of RESULTS.md.

    With `train` None, rows that are not trained yet are left out. `time_again` repeats the timing
    of tables with frames/s, for machines that were busy before.
    """
    run.mkdir(parents=True, exist_ok=True)
    demo = Demo.load(WEIGHTS, device)
    rewards = None
    if {*REWARD_TABLES} & {*options.tables}:
        rewards = Mixture(((load_sprite_reward(device=device), 1.0),))
    captions = held_out(options.captions)
    bench = Bench(demo, captions, options.seeds, options.frames, run, rewards=rewards, train=train)
    options = replace(options, controls=choose_controls(bench, options, device))
    chosen = [KINDS[number] for number in options.tables]
    rows = {row.name: row for table in chosen for row in table.rows(options)}
    if train is None:
        rows = {name: row for name, row in rows.items() if bench.trained(row)}
    outcomes = {name: bench.outcome(row, device) for name, row in rows.items()}
    if time_again:
        with_speed = [table for table in chosen if "frames/s" in table.columns]
        of_speed = {row.name: row for table in with_speed for row in table.rows(options)}
        timed = [row for name, row in of_speed.items() if name in rows]
        bench.time_again(timed, device)
        outcomes |= {row.name: bench.outcome(row, device) for row in timed}
    about = f"{describe(options)} {how_chosen(options)}{machines(outcomes)}".strip()
    sections = [draw(table, options, outcomes) for table in chosen]
    if {*DMD_TABLES} & {*options.tables}:
        sections.append(by_motion(outcomes[BASE.name], bench.captions))
    return "\n\n".join((fill(about, 120), *sections))


def describe(options: TablesOptions) -> str:
    """Describe the measurement and the trainings of the chosen tables."""
    chosen = {*options.tables}
    sentences = [
        f"{options.captions} held-out captions × {options.seeds} seeds, clips of"
        f" {4 * options.frames - 3} frames; every score is 0–100 with its 95 % bootstrap interval"
        " over captions, differences are paired by caption and seed. The base is frozen."
    ]
    if chosen.intersection(DMD_TABLES):
        short = f" (Tables 4 and 6: {options.short})" if chosen & {4, 6} else ""
        sentences.append(about_distribution_matching(options.training, short))
    if chosen.intersection(TWO_LEVEL_TABLES):
        sentences.append(about_distribution_matching(options.two_levels))
    if chosen.intersection(REWARD_TABLES):
        rewarded = options.rewarded
        sentences.append(
            f"By reward a row is trained for {rewarded.steps} steps of"
            f" {rewarded.batch * rewarded.accumulation} clips of {4 * rewarded.frames - 3} frames,"
            f" rank {rewarded.rank}.{about_start(rewarded)} Both searches choose among N candidates"
            " by the learned reward model, which the rewarded rows were trained with; the exact"
            " metrics judge. P&P repeats a level with fresh noise where it is uncertain."
            " Verifications, each of which decodes, are a chunk's."
        )
    sentences.append("ΔNFE: passes a chunk above the base's.")
    return " ".join(sentences)


def about_distribution_matching(training: RefineOptions, short: str = "") -> str:
    """Describe a training by distribution matching."""
    every = "every step" if training.ratio == 1 else f"one step in {training.ratio}"
    return (
        f"By distribution matching (dmd) a row is trained for {training.steps} steps of"
        f" {training.batch * training.accumulation} clips{short}, rank {training.rank}: the fake"
        f" score learns at every step, the row's factors at {every} after the first"
        f" {training.first_update}. The real score has guidance {training.guidance:g}."
        f"{about_start(training)}"
    )


def about_start(training: RefineOptions) -> str:
    """Describe the residual that a training starts from; "" if it is zero."""
    if training.start != "flow":
        return ""
    return f" A refiner starts at Δ = -{training.flow_share:g} v, with the base's flow v."
