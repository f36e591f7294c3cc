"""Evaluate a bundle on held-out captions: the table of `autorefiner demo evaluate`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from numpy import ndarray

from ..samplers import ode
from ..training.ahead import helpers
from ..wan.causal import CausalWan
from ..wan.vae import WanVAE
from .bundle import load_sprite_network, load_sprite_text, load_sprite_vae, recipe_of
from .captions import Caption
from .clips import (
    LATENT_FRAMES,
    PRESET,
    held_out,
    returned_clips,
    score,
    student_clips,
    teacher_clips,
    truth_clips,
)
from .metrics.diversity import diversity
from .metrics.evaluate import ClipScores
from .metrics.table import format_table, paired_difference, summarise
from .text_encoder import SpriteTextEncoder

LONG_FRAMES = 4 * LATENT_FRAMES
Column = Callable[[], tuple[Iterable[ndarray], Sequence[Caption]]]  # makes clips with captions


@dataclass(frozen=True, slots=True)
class Demo:
    """The models of a bundle."""

    text: SpriteTextEncoder
    vae: WanVAE
    teacher: CausalWan
    student: CausalWan

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Demo":
        """Load the models of a folder onto a device."""
        return cls(
            load_sprite_text(folder).to(device),
            load_sprite_vae(folder).to(device),
            load_sprite_network("teacher", folder, device),
            load_sprite_network("student", folder, device),
        )


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """The size of an evaluation."""

    captions: int = 256
    long_captions: int = 32  # for clips of four times the trained length
    pairs: int = 64  # captions sampled with two seeds, for diversity
    steps: int = 50  # the teacher's


def evaluate(folder: Path, options: EvaluateOptions, device: torch.device) -> str:
    """Evaluate a bundle; returns a section of RESULTS.md without its heading."""
    demo = Demo.load(folder, device)
    captions = held_out(options.captions)
    first_clips: list[ndarray] = []

    def remember_first(clips: Iterable[ndarray]) -> Iterator[ndarray]:
        for number, clip in enumerate(clips):
            if number < options.pairs:
                first_clips.append(clip)
            yield clip

    columns = make_columns(demo, captions, options, remember_first)
    scores = {name: score(*make(), name, helpers(device)) for name, make in columns.items()}
    pairs = captions[: options.pairs]
    again = list(student_clips(demo.student, demo.text, demo.vae, pairs, seed=1))
    differ = diversity(first_clips + again, [*pairs, *pairs])
    lines = [
        f"{len(captions)} held-out captions, one clip of 81 frames of 64x64 each; every row is"
        " 0–100, higher is",
        "better, with its 95 % bootstrap interval over captions. Models:"
        f" {describe_recipes(folder)}.",
        f"Four times as long: {options.long_captions} captions,"
        f" {4 * LONG_FRAMES - 3} frames, memory of {LATENT_FRAMES} latent frames.",
        f"Diversity of the student (two seeds of {len(pairs)} captions, against the world's own):"
        f" {differ:.1f}.",
        "",
        format_table({name: summarise(rows) for name, rows in scores.items()}),
        "",
        "Paired by caption, the difference of the totals:",
        "",
        *differences(scores, f"teacher, {options.steps} steps"),
        *list_totals(folder),
    ]
    return "\n".join(lines)


def make_columns(
    demo: Demo, captions: Sequence[Caption], options: EvaluateOptions,
    watch: Callable[[Iterable[ndarray]], Iterator[ndarray]],
) -> dict[str, Column]:  # fmt: skip
    """Return the table's columns; `watch` wraps the student's clips."""
    rare = held_out(options.captions, "composition")
    models = demo.student, demo.text, demo.vae
    return {
        "truth": lambda: (truth_clips(captions), captions),
        "truth through the VAE": lambda: (returned_clips(demo.vae, captions), captions),
        f"teacher, {options.steps} steps": lambda: (
            teacher_clips(demo.teacher, demo.text, demo.vae, captions, steps=options.steps),
            captions,
        ),
        "student": lambda: (watch(student_clips(*models, captions)), captions),
        "student, ODE": lambda: (
            student_clips(*models, captions, method_of=lambda texts: ode()), captions,
        ),
        "student, unseen pairs": lambda: (student_clips(*models, rare), rare),
        "student, 4 times as long": lambda: (
            student_clips(
                *models, captions[: options.long_captions], frames=LONG_FRAMES,
                preset=replace(PRESET, window=LATENT_FRAMES, positions="relative"),
            ), captions[: options.long_captions],
        ),
    }  # fmt: skip


def differences(scores: dict[str, list[ClipScores]], teacher: str) -> list[str]:
    """List the gains of student over teacher, and of sampling without fresh noise over with it."""
    lines = []
    for name, baseline in (("student", teacher), ("student, ODE", "student")):
        difference = paired_difference(scores[name], scores[baseline])
        lines.append(f"- {name} less {baseline}: {difference['total']}")
    return lines


def describe_recipes(folder: Path) -> str:
    """Describe the recipes and steps that trained the models, from their files."""
    models = []
    for name in ("vae", "teacher", "student"):
        last = recipe_of(name, folder)
        recipes = [*last.get("before", []), last]
        trained = [f"{recipe.get('recipe', name)} {recipe.get('steps', '?')}" for recipe in recipes]
        models.append(f"{' and '.join(trained)} steps")
    return ", ".join(models)


def list_totals(folder: Path) -> list[str]:
    """List the sample sheets' totals in the training of teacher and student, from their files."""
    lines = []
    for name in ("teacher", "student"):
        totals = recipe_of(name, folder).get("totals", {})
        if totals:
            by_steps = [f"{total} ({int(steps):,})" for steps, total in totals.items()]
            lines.append(f"- {name}: {', '.join(by_steps)}")
    if not lines:
        return []
    return ["", "Totals of a few captions while training, after so many steps:", "", *lines]


def write_section(path: Path, title: str, body: str) -> None:
    """Replace the section `## title` of a Markdown file, or append it."""
    text = path.read_text() if path.exists() else "# Results\n"
    head, *sections = text.split("\n## ")
    by_title = {section.split("\n", 1)[0]: section for section in sections}
    by_title[title] = f"{title}\n\n{body.strip()}\n"
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("\n## ".join([head, *by_title.values()]))
    temporary.replace(path)
