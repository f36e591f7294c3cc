"""A new prompt in the text of a timeline, as the page asks for it."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from ..refiner.timeline_text import (
    FRAMES,
    Moment,
    Section,
    format_sections,
    parse_timeline,
    timed,
)

MOST_FRAMES = 1_000_000  # pixel frames of a run


def edit_timeline(request: object) -> dict[str, str]:
    """Return {"text"} of a timeline with another prompt from a chunk on.

    The request is {"text", "prompt", "start", "before", "frames"}: the pixel frames at which the
    chunk and the one before it start, -1 for none, and those of the run before its recipe. A prompt
    that started with the chunk is replaced. Raises ValueError for anything else.
    """
    asked: Mapping = request if isinstance(request, dict) else {}
    text, prompt = (_text(asked, name) for name in ("text", "prompt"))
    start, before, frames = (_frame(asked, name) for name in ("start", "before", "frames"))
    new = _section(max(0, start), prompt)
    sections = [timed(section, frames) for section in parse_timeline(text)]
    others = [each for each in sections if not before < each.start.pixel_frame() <= start]
    edited = sorted([*others, new], key=lambda section: section.start.seconds)
    return {"text": format_sections(edited)}


def _section(frame: int, prompt: str) -> Section:
    """Return the section of a prompt, which may begin with a transition."""
    (section,) = parse_timeline(f"f0 {' '.join(prompt.split())}")
    return replace(section, start=Moment(Fraction(frame), FRAMES))


def _text(asked: Mapping, name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text: reload the page")
    return value


def _frame(asked: Mapping, name: str) -> int:
    value = asked.get(name)
    if not isinstance(value, int) or not -1 <= value <= MOST_FRAMES:
        raise ValueError(f"{name} is no pixel frame up to {MOST_FRAMES}: reload the page")
    return value
