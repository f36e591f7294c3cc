"""The text of a prompt timeline, as lines or JSON: parse it into sections, write them again."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Literal

from .memory.positions import Cut
from .schedule import FPS
from .timeline import Flush, Keep, Recache, Transition

MOST_BYTES = 64 << 10  # of a timeline
MOST_SCENES = 1000
MOST_FRAMES = 1_000_000  # of a recache or a flush
PRESET_FRAMES = -1  # of a recache without a number, until a run's preset says how many
SECONDS, FRAMES, SHARE = "s", "f", "share"

SECONDS_TIME = r"(?P<s>\d{1,6}(?:\.\d{1,6})?)s"
CLOCK_TIME = r"(?P<m>\d{1,4}):(?P<ms>[0-5]\d(?:\.\d{1,6})?)"
TIME = rf"(?:{SECONDS_TIME}|{CLOCK_TIME}|f(?P<f>\d{{1,8}}))"
TIMED = re.compile(rf"{TIME}(?=\s|\#|$)\s*(?P<rest>.*)")
WHOLE_TIME = re.compile(TIME)
RANGE = re.compile(r"\[\s*(?P<start>[^\[\]\s-]+)\s*-\s*(?P<end>[^\[\]\s]+)\s*\]\s*(?P<rest>.*)")
LASTING = re.compile(r"(?P<text>[^\[\]]*)\[\s*(?P<time>[^\[\]\s#]+)\s*(?P<cut>\#?)\s*\]")
# The first word of a line that is meant as a time: a number with a sign, a unit or a colon.
LIKE_A_TIME = re.compile(
    r"(?:[-+]?[\d.,]+(?:e\d+)?(?:ms|s|m|h|f|sec|secs|seconds?|mins?|minutes?|frames?|%)"
    r"|[-+][\d.]+|f-?[\d.]+|\d*:[\d:.]+|(?:nan|inf)s?)(?=\s|\#|$)"
)
TRANSITION = re.compile(
    r"(?:(?P<alone>keep|cut)|(?P<word>recache|flush)(?:\s+(?P<count>[-+]?[\d.][^\s:]*))?)"
    r"\s*:\s*(?P<rest>.*)"
)


@dataclass(frozen=True, slots=True)
class Moment:
    """A time of the whole clip: seconds, pixel frames, or a share of the run's length."""

    amount: Fraction
    unit: Literal["s", "f", "share"]

    def pixel_frame(self, frames: int = 0) -> int:
        """Return the first pixel frame at or after it, in a run of `frames` pixel frames."""
        scale = {SECONDS: FPS, FRAMES: 1, SHARE: frames}[self.unit]
        return ceil(self.amount * scale)

    @property
    def seconds(self) -> Fraction:
        """The time, unless it is a share."""
        return self.amount / FPS if self.unit == FRAMES else self.amount

    def __str__(self) -> str:
        if self.unit == SHARE:
            return f"{self.amount} of the run"
        if self.unit == FRAMES:
            return f"f{self.amount}"
        return f"{float(self.amount):.6f}".rstrip("0").rstrip(".") + "s"


@dataclass(frozen=True, slots=True)
class Section:
    """A prompt of a timeline as it was written. Without transition and cut it has the default."""

    start: Moment
    prompt: str
    transition: Transition | None = None
    cut: bool = False
    place: str = ""  # in the text, for messages, like `line 2`


def timed(section: Section, frames: int) -> Section:
    """Return a section of equal parts of `frames` pixel frames with its start in frames."""
    if section.start.unit != SHARE:
        return section
    return replace(section, start=Moment(Fraction(section.start.pixel_frame(frames)), FRAMES))


def check_prompt(prompt: str) -> None:
    """Raise ValueError for NULs and for text that is not UTF-8 (Python allows lone surrogates)."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        position = error.start + 1
        raise ValueError(
            f"the prompt is no UTF-8 text from character {position} on: save it as UTF-8"
        ) from None
    if "\0" in prompt:
        raise ValueError("the prompt holds NUL characters, as UTF-16 does: save it as UTF-8")


def parse_timeline(text: str) -> tuple[Section, ...]:
    """Parse a timeline; ValueError names the line of an error.

    Lines are `TIME [#] [TRANSITION:] TEXT`, `[TIME-TIME] TEXT` or `TEXT[TIME]`; one line may hold
    such lines, or equal parts, separated by `|`; or the text is a JSON list. Starts rise from 0.
    """
    check_prompt(text)
    size = len(text.encode())
    if size > MOST_BYTES:
        raise ValueError(f"timeline of {size} bytes: give at most {MOST_BYTES}")
    is_json = re.match(r"\s*\[\s*[{\]]", text)
    sections = _json_sections(text) if is_json else _text_sections(text)
    if len(sections) > MOST_SCENES:
        raise ValueError(f"timeline of {len(sections)} prompts: give at most {MOST_SCENES}")
    _check_order(sections)
    return tuple(sections)


def _check_order(sections: Sequence[Section]) -> None:
    """Raise ValueError for empty texts, and unless starts rise from 0."""
    if not sections:
        raise ValueError("the timeline is empty: give lines like `5s a green box`")
    for section in sections:
        if not section.prompt:
            raise ValueError(f"timeline, {section.place}: it has no text: write a prompt behind it")
    first = sections[0]
    if first.start.amount:
        raise ValueError(
            f"timeline, {first.place}: the first prompt starts at {first.start}: start it at 0s"
        )
    for early, late in pairwise(sections):
        if late.start.unit != SHARE and late.start.seconds <= early.start.seconds:
            raise ValueError(
                f"timeline, {late.place}: {late.start} does not rise above {early.start}"
                f" ({early.place}): give rising times"
            )


def _text_sections(text: str) -> list[Section]:
    lines = [
        (f"line {number}", line.strip())
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    first = lines[0][1] if lines else ""
    if RANGE.match(first):
        return _range_sections(lines)
    if first.endswith("]") and LASTING.match(first):
        return _lasting_sections(lines)
    if len(lines) == 1 and "|" in first:
        parts = [(f"part {n}", part.strip()) for n, part in enumerate(first.split("|"), start=1)]
        if all(TIMED.match(part) for _, part in parts):
            lines = parts
        elif not TIMED.match(first):
            return _equal_parts(first)
    return [_timed_section(*line, first=not index) for index, line in enumerate(lines)]


def _timed_section(place: str, line: str, first: bool) -> Section:
    """Parse `TIME [#] [TRANSITION:] TEXT`; the first line may lack its time."""
    match = TIMED.match(line)
    if match:
        return _section(_moment(match), match["rest"], place)
    if first and not LIKE_A_TIME.match(line):
        return _section(Moment(Fraction(0), SECONDS), line, place)
    raise ValueError(
        f"timeline, {place}: {_short(line.split(maxsplit=1)[0])} is no time: begin the line with"
        " one like 5s, 00:05 or f80"
    )


def _range_sections(lines: Sequence[tuple[str, str]]) -> list[Section]:
    """Parse lines `[START-END] [#] [TRANSITION:] TEXT` without gaps or overlaps."""
    sections, end = [], None
    for place, line in lines:
        match = RANGE.match(line)
        if not match:
            raise ValueError(f"timeline, {place}: expected [START-END] TEXT, as in line 1")
        start, stop = _time(match["start"], place), _time(match["end"], place)
        if stop.seconds <= start.seconds:
            raise ValueError(f"timeline, {place}: {stop} does not rise above {start}: swap them")
        if end is not None and start.seconds != end.seconds:
            kind = "an overlap" if start.seconds < end.seconds else "a hole"
            raise ValueError(
                f"timeline, {place}: starts at {start} and the range before ends at {end}, {kind}:"
                " let them meet"
            )
        end = stop
        sections.append(_section(start, match["rest"], place))
    return sections


def _lasting_sections(lines: Sequence[tuple[str, str]]) -> list[Section]:
    """Parse `TEXT[TIME]`, one or more a line: each lasts so long; `[TIME#]` begins with a cut."""
    sections, now = [], Moment(Fraction(0), SECONDS)
    for place, line in lines:
        position = 0
        while position < len(line):
            match = LASTING.match(line, position)
            if not match:
                raise ValueError(f"timeline, {place}: expected TEXT[10s] or TEXT[10s#]")
            lasts, position = _time(match["time"], place), match.end()
            sections.append(_section(now, f"{match['cut']}{match['text'].strip()}", place))
            now = Moment(now.amount + lasts.seconds, SECONDS)
    return sections


def _equal_parts(line: str) -> list[Section]:
    """Parse `TEXT | TEXT | …`: every text holds for an equal share of the run."""
    parts = line.split("|")
    return [
        _section(Moment(Fraction(index, len(parts)), SHARE), part.strip(), f"part {index + 1}")
        for index, part in enumerate(parts)
    ]


def _section(start: Moment, rest: str, place: str) -> Section:
    """Parse `[#] [TRANSITION:] TEXT`. `#` is a cut, with `flush 1` unless a transition follows."""
    cut = rest.startswith("#")
    rest = rest.removeprefix("#").strip()
    transition = None
    if match := TRANSITION.match(rest):
        word = match["word"] or match["alone"]
        transition, rest = _transition(word, match["count"], place), match["rest"]
    return _with_cut(Section(start, rest.strip(), transition, cut, place))


def _with_cut(section: Section) -> Section:
    """Turn the transition `cut` into the mark, and give `#` alone its `flush 1`."""
    transition = section.transition or (Flush(1) if section.cut else None)
    is_cut = isinstance(transition, Cut)
    return Section(
        section.start,
        section.prompt,
        Keep() if is_cut else transition,
        section.cut or is_cut,
        section.place,
    )


def _transition(word: str, count: object, place: str) -> Transition:
    """Make a transition from its word and number."""
    least = {"recache": 1, "flush": 0}.get(word)
    if least is None:
        return Keep() if word == "keep" else Cut()
    if count is None:
        return Flush() if word == "flush" else Recache(PRESET_FRAMES)
    digits = str(count)
    is_whole = digits.isdecimal() and digits.isascii() and len(digits) <= len(str(MOST_FRAMES))
    if not is_whole or not least <= int(digits) <= MOST_FRAMES:
        raise ValueError(
            f"timeline, {place}: {word} {_short(digits)}: give a whole number of latent frames from"
            f" {least} to {MOST_FRAMES}"
        )
    return Flush(int(digits)) if word == "flush" else Recache(int(digits))


def with_default(sections: Sequence[Section], text: str) -> tuple[Section, ...]:
    """Give sections without a transition this one: `keep`, `flush 1`, `recache 12`, `cut`, `#`."""
    mark, colon = ("#", "") if text.startswith("#") else ("", ":")
    default = _section(Moment(Fraction(0), SECONDS), f"{text.strip()}{colon} x", "the default")
    if default.prompt != "x" or not (default.transition or mark):
        raise ValueError(f"transition {_short(text)}: give keep, recache [N], flush [N], cut or #")
    return tuple(
        replace(section, transition=default.transition, cut=default.cut)
        if section.transition is None
        else section
        for section in sections
    )


def _time(text: str, place: str) -> Moment:
    match = WHOLE_TIME.fullmatch(text)
    if not match:
        raise ValueError(
            f"timeline, {place}: {_short(text)} is no time: give one like 5s, 00:05 or f80"
        )
    return _moment(match)


def _moment(match: re.Match[str]) -> Moment:
    if match["f"]:
        return Moment(Fraction(match["f"]), FRAMES)
    if match["m"]:
        return Moment(60 * int(match["m"]) + Fraction(match["ms"]), SECONDS)
    return Moment(Fraction(match["s"]), SECONDS)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


def _json_sections(text: str) -> list[Section]:
    try:
        entries = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"timeline is not JSON ({error}): save it again") from error
    places = [f"entry {number}" for number in range(1, len(entries) + 1)]
    return [_json_section(*pair) for pair in zip(entries, places, strict=True)]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


# The keys of a JSON entry: the types of a value, and what to write.
KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "start": ((int, float, str), "seconds, or a time like f80"),
    "prompt": ((str,), "a text"),
    "transition": ((str,), "keep, recache, flush, cut or #"),
    "frames": ((int,), "a whole number"),
}


def _json_section(entry: object, place: str) -> Section:
    if not isinstance(entry, dict):
        raise ValueError(
            f'timeline, {place}: expected an object like {{"start": 5, "prompt": "…"}}'
        )
    for key, value in entry.items():
        types, wanted = KEYS.get(key, ((), f"only {', '.join(KEYS)}"))
        if not isinstance(value, types) or isinstance(value, bool):
            raise ValueError(
                f"timeline, {place}: {_short(key)} is {_short(str(value))}: give {wanted}"
            )
    for key in ("start", "prompt"):
        if key not in entry:
            raise ValueError(f"timeline, {place}: it has no {key!r}: give {KEYS[key][1]}")
    check_prompt(entry["prompt"])
    start, word, count = entry["start"], entry.get("transition"), entry.get("frames")
    time = start if isinstance(start, str) else f"{start}s"
    words = ("keep", "recache", "flush", "cut", "#")
    if word is not None and word not in words:
        raise ValueError(f"timeline, {place}: transition {_short(word)}: {KEYS['transition'][1]}")
    if count is not None and word not in ("recache", "flush", "#"):
        raise ValueError(f"timeline, {place}: frames are of a recache or a flush: remove them")
    transition = None
    if word:
        transition = _transition("flush" if word == "#" else word, count, place)
    moment, prompt = _time(time, place), entry["prompt"].strip()
    return _with_cut(Section(moment, prompt, transition, word == "#", place))


def format_sections(sections: Sequence[Section]) -> str:
    """Write sections as lines that `parse_timeline` reads alike, or as JSON where it cannot."""
    lines = [" ".join(_words(section)) for section in sections]
    text = "\n".join(lines)
    written = [(each.start, each.prompt, each.transition, each.cut) for each in sections]
    try:
        read = parse_timeline(text)
    except ValueError:
        read = ()
    if written == [(each.start, each.prompt, each.transition, each.cut) for each in read]:
        return text
    return json.dumps([_entry(section) for section in sections], ensure_ascii=False, indent=1)


def _words(section: Section) -> Iterator[str]:
    yield str(section.start)
    if section.cut:
        yield "#"
    if section.transition is not None:
        yield f"{transition_name(section.transition)}:"
    yield section.prompt


def _entry(section: Section) -> dict[str, object]:
    entry: dict[str, object] = {"start": str(section.start), "prompt": section.prompt}
    match section.transition:
        case Flush(frames):
            entry |= {"transition": "#" if section.cut else "flush", "frames": frames}
        case Recache(frames):
            entry["transition"] = "recache"
            entry |= {"frames": frames} if frames != PRESET_FRAMES else {}
        case Keep():
            entry["transition"] = "cut" if section.cut else "keep"
    return entry


def transition_name(transition: Transition) -> str:
    """Return a transition as a line of a timeline has it."""
    match transition:
        case Recache(frames):
            return "recache" if frames == PRESET_FRAMES else f"recache {frames}"
        case Flush(frames):
            return f"flush {frames}"
    return "cut" if isinstance(transition, Cut) else "keep"
