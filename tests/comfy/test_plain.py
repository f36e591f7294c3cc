"""Text of unknown origin is shown on the page as text."""

import json
import re

import pytest

from autorefiner.nodes.hosts.plain import plain_text
from autorefiner.refiner.noise.file import RefinerCard

LINK = re.compile(r"(https?|ftp|file)://|\bwww\.", re.IGNORECASE)  # the page turns these into links


@pytest.mark.parametrize(
    "text",
    [
        "<a href=//evil.example>Update now</a>", "<img src=x onerror=alert(1)>", "&lt;b&gt;",
        "\x1b[2J", '" onmouseover="x', "see http://evil.example/x or HTTPS://evil.example",
        "www.evil.example WwW.evil.example", "file://etc", "a\nb\u202e",
    ],
)  # fmt: skip
def test_no_markup_and_no_link_is_left(text: str) -> None:
    shown = plain_text(text)
    assert not set(shown) & set('<>&"\x1b\n\u202e') and not LINK.search(shown)


def test_ordinary_text_stays_as_it_is() -> None:
    text = "saved as mine/foxes.refiner.safetensors; Δ 0.5, rank 64 (750, 500)"
    assert plain_text(text) == text


@pytest.mark.parametrize(
    "objective", ["<b>x</b>", "x" * 5000, "\x1b[2J", "http://evil.example", "a\nb"]
)
def test_a_card_says_what_it_was_trained_for_in_plain_words(objective: str) -> None:
    metadata = {
        "rank": 4,
        "levels": [750],
        "history": "shared",
        "previous": "joint",
        "objective": objective,
    }
    card = RefinerCard.parse(json.dumps(metadata))
    assert re.fullmatch(r"[\w +.,-]{0,60}", card.objective)
    assert RefinerCard.parse(json.dumps({**metadata, "objective": "dmd"})).objective == "dmd"
