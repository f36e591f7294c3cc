"""Timelines of prompts as text: what is read, what is refused, and where scenes start."""

import json
from dataclasses import replace
from fractions import Fraction
from time import process_time

import pytest

from autorefiner.refiner.memory.positions import Cut
from autorefiner.refiner.prompt_timeline import (
    default_transition,
    format_sections,
    parse_timeline,
    place_sections,
)
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.timeline import Flush, Keep, Recache, Scene, Timeline

RELATIVE = replace(PRESETS["longlive"], positions="relative")


def plan_of(preset=RELATIVE, frames: int = 40, given: int = 0) -> RunPlan:
    return RunPlan(preset, frames, 8, 8, given=given)


def read(text: str) -> list[tuple]:
    """Return (seconds, prompt, transition, cut) of each section."""
    return [
        (float(each.start.seconds), each.prompt, each.transition, each.cut)
        for each in parse_timeline(text)
    ]


def scenes(text: str, plan: RunPlan | None = None) -> tuple[Scene, ...]:
    return place_sections(parse_timeline(text), plan or plan_of()).timeline.scenes


def test_lines_have_a_time_a_cut_a_transition_and_a_text() -> None:
    text = """
        0s            a red star circles

        00:05.5  recache:  a green box rests
        f96 flush 2: a disc
        8s # a blue ring
        9s# recache 6: a plus
        10s # keep: a hoop
        11s cut: a ball
        01:10 keep: a star
    """
    assert read(text) == [
        (0, "a red star circles", None, False),
        (5.5, "a green box rests", Recache(-1), False),
        (6, "a disc", Flush(2), False),
        (8, "a blue ring", Flush(1), True),
        (9, "a plus", Recache(6), True),
        (10, "a hoop", Keep(), True),
        (11, "a ball", Keep(), True),
        (70, "a star", Keep(), False),
    ]


@pytest.mark.parametrize(
    "prompt",
    ["a dog: brown", "keep 5: x", "fade: out", "Recache: x", "recache 3 x", "cut", "#1 fan: x"],
)
def test_a_transition_is_one_of_four_words_and_a_colon(prompt) -> None:
    text = f"a\n5s {prompt}"
    expected = (prompt, False) if not prompt.startswith("#") else (prompt[1:], True)
    assert read(text)[1][1::2] == expected


@pytest.mark.parametrize("line", ["a star", "3 dogs run", "2D art", "12 flush: x", "a | b\n5s c"])
def test_the_first_line_may_lack_its_time(line) -> None:
    assert read(line)[0][:2] == (0, line.split("\n")[0])


def test_lines_with_times_may_share_a_line() -> None:
    lines = ["0s a", "5s # b", "f96 flush 2: c"]
    assert read(" | ".join(lines)) == read("\n".join(lines))
    assert read("0s a | b")[0][1] == "a | b"


def test_equal_parts_divide_the_run() -> None:
    sections = parse_timeline("a | flush 3: b | # c | recache: d")
    assert [each.start.amount for each in sections] == [Fraction(part, 4) for part in range(4)]
    assert [each.transition for each in sections] == [None, Flush(3), Flush(1), Recache(-1)]
    for frames in (40, 21):
        starts = [scene.start for scene in scenes("a | # b | c | d", plan_of(frames=frames))]
        pixels = 4 * frames - 3
        for index, start in enumerate(starts[1:], start=1):
            assert 4 * start - 3 >= index * pixels / 4 > 4 * (start - 3) - 3


def test_ranges_meet() -> None:
    text = "[00:00-00:05] a\n[5s-f96]#b\n[6s-00:09] recache 4: c"
    assert read(text) == [
        (0, "a", None, False), (5, "b", Flush(1), True), (6, "c", Recache(4), False),
    ]  # fmt: skip


def test_prompts_last() -> None:
    text = "a[5s] flush 2: b[f16#]\nc[10s#]"
    assert read(text) == [
        (0, "a", None, False), (5, "b", Flush(2), True), (6, "c", Flush(1), True),
    ]  # fmt: skip


def test_json_says_the_same() -> None:
    entries = [
        {"start": 0, "prompt": "a\nstar"},
        {"start": 5.5, "prompt": "recache: b", "transition": "recache", "frames": 12},
        {"start": "00:07", "prompt": "c", "transition": "#"},
        {"start": "f200", "prompt": "d", "transition": "cut"},
        {"start": 20, "prompt": "e", "transition": "recache"},
        {"start": 21, "prompt": "f", "transition": "flush", "frames": 0},
    ]
    assert read(json.dumps(entries)) == [
        (0, "a\nstar", None, False),
        (5.5, "recache: b", Recache(12), False),
        (7, "c", Flush(1), True),
        (12.5, "d", Keep(), True),
        (20, "e", Recache(-1), False),
        (21, "f", Flush(0), False),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" \n\n", "empty"),
        ("[]", "empty"),
        ("2s a\n5s b", "line 1.*0s"),
        ("0s a\n5s b\n5s c", "line 3.*rise"),
        ("0s a\n5s b\nf80 c", "line 3.*rise"),
        ("0s a\n\n5s b\n4.9s c", "line 4.*rise"),
        ("0s a\n5s", "line 2.*text"),
        ("0s\n5s b", "line 1.*text"),
        ("0s a\n5s recache 3:", "line 2.*text"),
        ("a | | b", "part 2.*text"),
        ("0m a", "line 1.*'0m'"),
        ("-5s a", "line 1.*'-5s'"),
        ("nan a", "line 1.*'nan'"),
        ("0s a\n5m b", "line 2.*'5m'"),
        ("0s a\nb", "line 2.*'b'"),
        ("0s a\n1e9s b", "line 2.*1e9s"),
        ("0s a\n9999999s b", "line 2.*9999999s"),
        ("0s a\n00:60 b", "line 2.*00:60"),
        ("0s a\n5s recache 0: b", "line 2.*whole number"),
        ("0s a\n5s recache -1: b", "line 2.*whole number"),
        ("0s a\n5s recache 1.5: b", "line 2.*whole number"),
        (f"0s a\n5s flush {'9' * 5000}: b", "line 2.*whole number"),
        ("[0s-5s] a\n[4s-6s] b", "line 2.*overlap"),
        ("[0s-5s] a\n[6s-7s] b", "line 2.*hole"),
        ("[5s-0s] a", "line 1.*rise"),
        ("[0s-5s] a\n5s b", "line 2.*START"),
        ("[0s-5x] a", "line 1.*'5x'"),
        ("a[5s]\nb", "line 2"),
        ("a[5s]\n[5s]", "line 2.*text"),
        ("a[0s] b[5s]", "rise"),
        ("a[x]", "line 1.*'x'"),
        ("[{", "JSON"),
        ('[{"start": NaN, "prompt": "a"}]', "NaN"),
        ('[{"start": 1e400, "prompt": "a"}]', "entry 1.*inf"),
        ('[{"start": -1, "prompt": "a"}]', "entry 1.*-1"),
        ('[{"start": true, "prompt": "a"}]', "entry 1.*start"),
        ('[{"start": 0, "prompt": 5}]', "entry 1.*prompt"),
        ('[{"start": 0, "prompt": ""}]', "entry 1.*text"),
        ('[{"start": 0}]', "entry 1.*prompt"),
        ('[{"start": 0, "prompt": "a"}, 5]', "entry 2"),
        ('[{"start": 0, "prompt": "a", "end": 5}]', "entry 1.*'end'"),
        ('[{"start": 0, "prompt": "a\\u0000"}]', "NUL"),
        ('[{"start": 0, "prompt": "\\ud800"}]', "UTF-8"),
        ('[{"start": 0, "prompt": "a", "transition": "fade"}]', "entry 1.*fade"),
        ('[{"start": 0, "prompt": "a", "transition": "keep", "frames": 3}]', "entry 1.*frames"),
        ('[{"start": 0, "prompt": "a", "transition": "flush", "frames": 1.5}]', "entry 1.*frames"),
        (f"[{{{'[' * 30_000}", "JSON"),
        (f"[{{\"start\": {'9' * 5000}, \"prompt\": \"a\"}}]", "JSON"),
        ("a" * 70_000, "at most"),
        ("\n".join(f"{second}s a" for second in range(1001)), "at most"),
        ("a\0", "NUL"),
    ],
)  # fmt: skip
def test_a_wrong_timeline_says_where(text, words) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        parse_timeline(text)


@pytest.mark.parametrize("text", ["a[5s]\n" + "b" * 60_000 + "]", "0s " + "recache" + " " * 60_000])
def test_long_lines_take_no_time(text) -> None:
    began = process_time()
    with pytest.raises(ValueError, match=r"line 2|line 1"):
        parse_timeline(text + ("" if text.endswith("]") else "\n1"))
    assert process_time() - began < 3


@pytest.mark.parametrize("given", [0, 1, 6, 7])
@pytest.mark.parametrize("first_alone", [False, True])
def test_a_scene_starts_with_the_first_chunk_whose_pixels_are_at_or_after_it(
    given, first_alone
) -> None:
    plan = plan_of(replace(RELATIVE, first_alone=first_alone), 40, given)
    chunks = [*plan.given_chunks, *plan.chunks]
    pixels = [0 if not chunk.start else 1 + 4 * (chunk.start - 1) for chunk in chunks]
    for frame in range(1, pixels[-1] + 1):
        start = scenes(f"a\nf{frame} b", plan)[1].start
        assert start == next(c.start for c, p in zip(chunks, pixels, strict=True) if p >= frame)
    placed = place_sections(parse_timeline("a\n5s recache 6:  b\n8s #c"), plan)
    assert [scene.chunk.start for scene in placed.sections[:1]] == [0]


def test_the_snapping_is_shown() -> None:
    text = "0s a red star\n5s recache: a green box\n8s # a ring\nf150 cut: a hoop"
    assert str(place_sections(parse_timeline(text), plan_of())).split("\n") == [
        "0s -> chunk 1, frame 0 (0.0 s): a red star",
        "5s -> chunk 8, frame 81 (5.1 s), recache 12: a green box",
        "8s -> chunk 12, frame 129 (8.1 s), flush 1, cut: a ring",
        "f150 -> chunk 14, frame 153 (9.6 s), keep, cut: a hoop",
    ]


def test_the_default_transition_is_the_presets() -> None:
    for preset, frames in [
        (PRESETS["longlive"], 12),
        (PRESETS["longlive"].changed(window=21), 12),
        (PRESETS["krea-14b"], 6),
        (PRESETS["self-forcing"], 40),
    ]:
        plan = plan_of(preset)
        assert default_transition(plan) == Recache(frames)
        for line in ("5s b", "5s recache: b"):
            assert scenes(f"a\n{line}", plan)[1] == Scene(21, "b", Recache(frames))


def test_marks_become_events() -> None:
    assert scenes("a\n5s # b\n6s # keep: c\n7s cut: d\n8s flush: e")[1:] == (
        Scene(21, "b", Flush(1), Cut()),
        Scene(27, "c", Keep(), Cut()),
        Scene(30, "d", Keep(), Cut()),
        Scene(33, "e", Flush(1)),
    )
    assert scenes("0s # a") == Timeline.of("a").scenes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nf154 b", "line 2.*157 frames"),
        ("a\n99s b", "line 2.*157 frames"),
        ("a\n5s b\n5.01s c", "line 3.*chunk 8.*f82"),
        ("a\nf82 b\nf93 c", "line 3.*chunk 9"),
    ],
)
def test_a_scene_needs_a_chunk(text, words) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        place_sections(parse_timeline(text), plan_of(frames=40))


def test_a_cut_needs_relative_positions() -> None:
    for line in ("5s # b", "5s cut: b"):
        with pytest.raises(ValueError, match="relative positions"):
            place_sections(parse_timeline(f"a\n{line}"), plan_of(PRESETS["longlive"]))


@pytest.mark.parametrize(
    "text",
    [
        "0s a\n5s recache: b\n8s # c",
        "a | # keep: b | cut: c",
        '[{"start": 0, "prompt": "a\\nb"}, {"start": 5, "prompt": "keep: c", "transition": "#"}]',
        '[{"start": 0, "prompt": "# a"}, {"start": 5, "prompt": "b", "transition": "cut"}]',
        '[{"start": 0, "prompt": "a"}, {"start": 5, "prompt": "[x]", "transition": "keep"}]',
    ],
)
def test_a_placed_timeline_is_written_as_text_that_gives_it_again(text) -> None:
    placed = place_sections(parse_timeline(text), plan_of())
    again = place_sections(parse_timeline(placed.text), plan_of())
    assert again.timeline == placed.timeline
    assert again.text == placed.text
    longer = place_sections(parse_timeline(placed.text), plan_of(frames=60))
    assert longer.timeline == placed.timeline
    sections = parse_timeline(text)
    if "|" not in text:
        assert read(format_sections(sections)) == read(text)


def test_an_endless_run_takes_times_alone() -> None:
    plan = RunPlan(PRESETS["self-forcing"].changed(window=9, sink=3), None, 4, 4)
    placed = place_sections(parse_timeline("a\n5s b\n1439:00 c"), plan)
    first, second, last = (section.scene for section in placed.sections)
    assert (first.start, second.start, second.transition) == (0, 21, Recache(9))
    assert 4 * last.start - 3 >= 1439 * 60 * 16 > 4 * (last.start - 3) - 3
    with pytest.raises(ValueError, match="endless"):
        place_sections(parse_timeline("a | b"), plan)
