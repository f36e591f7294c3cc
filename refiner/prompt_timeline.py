"""Place a timeline of prompts on the chunks of a run: each starts with the first chunk it can."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import takewhile

from .memory.positions import Cut, check_cut
from .run_plan import RunPlan
from .schedule import FPS, Chunk, first_pixel_frame
from .timeline import Recache, Scene, Timeline
from .timeline_text import (
    FRAMES,
    MOST_BYTES,
    PRESET_FRAMES,
    SHARE,
    Moment,
    Section,
    check_prompt,
    format_sections,
    parse_timeline,
    timed,
    transition_name,
    with_default,
)

__all__ = [
    "EXTENDED", "MOST_BYTES", "PlacedSection", "PlacedTimeline", "Section", "check_prompt",
    "default_transition", "extended_timeline", "format_sections", "parse_timeline",
    "place_sections", "steered_sections", "with_default",
]  # fmt: skip


EXTENDED = "flush 1"  # how a new prompt takes over an extended clip, unless said otherwise
LONGEST = 24 * 3600 * FPS  # pixel frames of an endless run in which a prompt may start


@dataclass(frozen=True, slots=True)
class PlacedSection:
    """A section on the first chunk of a run that starts at or after it."""

    section: Section
    chunk: Chunk
    scene: Scene[str]

    @property
    def pixel_frame(self) -> int:
        """The first pixel frame that shows the section's prompt."""
        return first_pixel_frame(self.chunk.start)

    def __str__(self) -> str:
        frame = self.pixel_frame
        changes = [transition_name(self.scene.transition)] if self.chunk.start else []
        changes += ["cut"] if self.scene.cut else []
        chunk, prompt = self.chunk.index + 1, " ".join(self.section.prompt.split())
        start = f"{self.section.start} -> chunk {chunk}, frame {frame} ({frame / FPS:.1f} s)"
        return f"{', '.join([start, *changes])}: {prompt}"


@dataclass(frozen=True, slots=True)
class PlacedTimeline:
    """Sections on the chunks of a run. `str` shows one a line."""

    sections: tuple[PlacedSection, ...]

    @property
    def timeline(self) -> Timeline[str]:
        """The scenes, for a rollout after `map` has encoded their prompts."""
        return Timeline(tuple(placed.scene for placed in self.sections))

    @property
    def text(self) -> str:
        """A text that gives the same timeline again in any run with these chunks.

        Starts are pixel frames, transitions are written out; the same for a longer run.
        """
        return format_sections(
            [
                Section(
                    Moment(Fraction(placed.pixel_frame), FRAMES),
                    placed.scene.prompt,
                    placed.scene.transition if placed.chunk.start else None,
                    placed.scene.cut is not None,
                )
                for placed in self.sections
            ]
        )

    def __str__(self) -> str:
        return "\n".join(map(str, self.sections))


def chunks_of(plan: RunPlan) -> tuple[Chunk, ...]:
    """Return all chunks, given ones first; of an endless run, those of the first day."""
    if not plan.endless:
        return (*plan.given_chunks, *plan.chunks)
    first_day = takewhile(lambda chunk: first_pixel_frame(chunk.start) <= LONGEST, plan.chunks)
    return (*plan.given_chunks, *first_day)


def total_frames(plan: RunPlan) -> int:
    """Return the pixel frames of the clip; of an endless run, those of the first day."""
    return LONGEST if plan.endless else first_pixel_frame(plan.given + plan.frames)


def within(sections: Sequence[Section], plan: RunPlan) -> list[Section]:
    """Return the sections that start no later than the last chunk."""
    end, total = first_pixel_frame(chunks_of(plan)[-1].start), total_frames(plan)
    return [section for section in sections if section.start.pixel_frame(total) <= end]


def steered_sections(
    sections: Sequence[Section], plan: RunPlan, length: int, ends: bool
) -> Sequence[Section]:
    """Return the sections of a run that a recipe made of `length` latent frames.

    Equal parts are those of that length. Where the recipe `ends` the clip, later sections are left
    out.
    """
    total = first_pixel_frame(length)
    sections = [timed(section, total) for section in sections]
    return within(sections, plan) if ends else sections


def default_transition(plan: RunPlan) -> Recache:
    """Return the transition of a section that names none: rewrite the preset's share of memory."""
    if plan.preset.recache > 0:
        return Recache(plan.preset.recache)
    if plan.endless:
        return Recache(plan.preset.window)
    frames, window = plan.given + plan.frames, plan.preset.window
    return Recache(frames if window < 0 else min(window, frames))


def place_sections(sections: Sequence[Section], plan: RunPlan) -> PlacedTimeline:
    """Place each section on the first chunk whose first pixel frame is at or after its start.

    Times count from the start of the clip, given frames included. Raises ValueError for a section
    after the last chunk's start, for two on one chunk, and for a cut without relative positions.
    """
    chunks = chunks_of(plan)
    if plan.endless and any(section.start.unit == SHARE for section in sections):
        raise ValueError("timeline of equal parts: an endless run has none, give each a time")
    total = total_frames(plan)
    placed: list[PlacedSection] = []
    for section in sections:
        chunk = _first_chunk(chunks, section.start.pixel_frame(total))
        if chunk is None:
            last = first_pixel_frame(chunks[-1].start)
            raise ValueError(
                f"timeline, {section.place}: {section.start} is after the start of the last chunk"
                f" of {total} frames ({total / FPS:.1f} s), which is f{last} ({last / FPS:.1f} s):"
                " start it earlier or make the clip longer"
            )
        if placed and placed[-1].chunk == chunk:
            raise ValueError(
                f"timeline, {section.place}: {section.start} and {placed[-1].section.start} both"
                f" start with chunk {chunk.index + 1}, and a chunk has one prompt: start it at"
                f" f{first_pixel_frame(chunk.start) + 1} or later, or remove one"
            )
        placed.append(PlacedSection(section, chunk, _scene(section, chunk, plan)))
    timeline = PlacedTimeline(tuple(placed))
    if timeline.timeline.cuts:
        check_cut(plan.positions)
    return timeline


def _first_chunk(chunks: Sequence[Chunk], pixel_frame: int) -> Chunk | None:
    later = (chunk for chunk in chunks if first_pixel_frame(chunk.start) >= pixel_frame)
    return next(later, None)


def _scene(section: Section, chunk: Chunk, plan: RunPlan) -> Scene[str]:
    """Make the scene of a chunk; the first one has nothing to change from."""
    if not chunk.start:
        return Scene(0, section.prompt)
    transition = section.transition or default_transition(plan)
    if transition == Recache(PRESET_FRAMES):
        transition = default_transition(plan)
    return Scene(chunk.start, section.prompt, transition, Cut() if section.cut else None)


def extended_timeline(
    before: Mapping[str, str], prompt: str, transition: str | None, plan: RunPlan
) -> PlacedTimeline | None:
    """Return the timeline of a clip that goes on from an earlier one, whose metadata is `before`.

    Scenes of the earlier clip stay in force. A new prompt takes over with the first new chunk; an
    empty one lets the earlier timeline go on. None where there is no earlier prompt.
    """
    if before.get("timeline"):
        sections = parse_timeline(before["timeline"])
    elif before.get("prompt"):
        sections = (Section(Moment(Fraction(0), FRAMES), before["prompt"]),)
    else:
        return None
    first_new = Moment(Fraction(first_pixel_frame(plan.given)), FRAMES)
    past = [section for section in sections if section.start.seconds < first_new.seconds]
    if prompt and past[-1].prompt != prompt:
        new = Section(first_new, prompt, place="the new prompt")
        return place_sections([*past, *with_default([new], transition or EXTENDED)], plan)
    return place_sections(within(sections, plan), plan)
