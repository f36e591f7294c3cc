"""A prompt that the page adds to a timeline."""

import pytest

from autorefiner.nodes.timeline_edit import edit_timeline

LINES = "0s a star\n5s flush 1: a box\n8s a ring"
AT_5S = {"start": 81, "before": 69, "frames": 161}


def edited(text: str, prompt: str, **place: int) -> str:
    return edit_timeline({"text": text, "prompt": prompt, **AT_5S, **place})["text"]


@pytest.mark.parametrize(
    ("place", "lines"),
    [
        ({"start": 33, "before": 21}, ["0s a star", "f33 new", "5s flush 1: a box", "8s a ring"]),
        ({}, ["0s a star", "f81 new", "8s a ring"]),  # replaces the prompt that starts there
        ({"start": 141, "before": 129}, [*LINES.splitlines(), "f141 new"]),
        ({"start": 0, "before": -1}, ["f0 new", "5s flush 1: a box", "8s a ring"]),
    ],
)
def test_a_prompt_is_added_at_its_chunk(place: dict, lines: list[str]) -> None:
    assert edited(LINES, " new\n", **place).splitlines() == lines


def test_other_forms_become_lines() -> None:
    assert edited("a | b", "new").splitlines() == ["f0 a", "f81 new"]  # b would start at 80.5
    assert edited("a | b", "new", start=33, before=21).splitlines() == ["f0 a", "f33 new", "f81 b"]
    entry = '[{"start": 0, "prompt": "a"}]'
    assert edited(entry, "cut: new").splitlines() == ["0s a", "f81 # keep: new"]


@pytest.mark.parametrize(
    ("request_", "keyword"),
    [
        (None, "text"),
        ({"text": LINES, "prompt": " ", **AT_5S}, "prompt"),
        ({"text": LINES, "prompt": "new", **AT_5S, "start": 1e9}, "start"),
        ({"text": LINES, "prompt": "new", **AT_5S, "frames": "81"}, "frames"),
        ({"text": "5s a star", "prompt": "new", **AT_5S}, "0s"),
    ],
)
def test_what_is_no_edit_is_refused(request_: object, keyword: str) -> None:
    with pytest.raises(ValueError, match=keyword):
        edit_timeline(request_)
