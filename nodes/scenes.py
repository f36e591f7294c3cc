"""The scenes of a Prompt Timeline, as entries of a CONDITIONING, and their place in a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..refiner.prompt_timeline import PlacedTimeline, Section, place_sections, steered_sections
from ..refiner.sample import check_switches
from ..refiner.timeline import Timeline
from .run import Run

SCENE = "autorefiner_scene"  # the option of an entry that holds its SceneMark


@dataclass(frozen=True, slots=True)
class SceneMark:
    """Says which section of a timeline an entry is the context of."""

    sections: tuple[Section, ...]  # of the whole timeline
    index: int


def conditioning_of(
    sections: tuple[Section, ...], encode: Callable[[str], Tensor]
) -> list[list[Any]]:
    """Encode a timeline as a CONDITIONING, one entry a section; equal prompts share a context."""
    contexts = {prompt: encode(prompt) for prompt in {section.prompt: None for section in sections}}
    return [
        [contexts[section.prompt], {SCENE: SceneMark(sections, index)}]
        for index, section in enumerate(sections)
    ]


def sections_of(options: Sequence[Mapping[str, Any]]) -> tuple[Section, ...] | None:
    """Return the timeline that the entries of a CONDITIONING form; None for one plain prompt.

    `options` are those of the entries. ValueError for entries that are neither.
    """
    marks = [each.get(SCENE) for each in options]
    if marks == [None]:
        return None
    sections = marks[0].sections if marks and marks[0] else ()
    if not marks or marks != [SceneMark(sections, index) for index in range(len(sections))]:
        raise ValueError(
            f"positive has {len(marks)} entries: the models take one prompt, so connect one, or one"
            " Prompt Timeline"
        )
    return sections


def placed_scenes(options: Sequence[Mapping[str, Any]], run: Run) -> PlacedTimeline | None:
    """Place the scenes of a CONDITIONING on the chunks of a run; None for one plain prompt.

    A recipe moves no scene; where it ends the clip, later ones are left out. Raises ValueError for
    scenes that do not fit the chunks or the method.
    """
    sections = sections_of(options)
    if sections is None:
        return None
    if run.recipe.commands:
        sections = steered_sections(sections, run.plan, run.length, run.recipe.ends)
    placed = place_sections(sections, run.plan)
    check_switches(placed.timeline, run.plan, run.sampler())
    return placed


def context_of(
    contexts: Sequence[Tensor], placed: PlacedTimeline | None
) -> Tensor | Timeline[Tensor]:
    """Return the context of a plain prompt, or the timeline of the contexts of placed scenes."""
    if placed is None:
        return contexts[0]
    scenes = placed.timeline.scenes
    pairs = zip(scenes, contexts[: len(scenes)], strict=True)
    return Timeline(tuple(replace(scene, prompt=context) for scene, context in pairs))


def scenes_text(placed: PlacedTimeline) -> str:
    """Say in one line where each scene begins."""
    return "; ".join(map(str, placed.sections))
