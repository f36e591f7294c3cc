"""Make text safe for ComfyUI's page, which shows a node's text as HTML and links addresses."""

import re

from ...refiner.terminal import printable

MARKUP = str.maketrans({"<": "‹", ">": "›", "&": "＆", '"': "”"})
# Addresses, [[label|url]], and the page's own placeholder __LNK0__, at which it would fail.
ADDRESS = re.compile(r":(?=//)|www(?=\.)|\[(?=\[)|__(?=LNK)", re.IGNORECASE)
NO_LINK = "\u2060"  # a word joiner, which is invisible
LONGEST_WHOLE = 24  # characters of a word that fits into a narrow node

INSIDE_WORD = re.compile(r"(?<=[A-Za-z])(?=[A-Za-z])")


def whole_words(text: str) -> str:
    """Keep words together in ComfyUI's text widget, whose style breaks lines between any letters.

    Longer words than LONGEST_WHOLE may still be broken.
    """
    words = re.split("(\\s+)", text)
    return "".join(
        INSIDE_WORD.sub(NO_LINK, word) if len(word) <= LONGEST_WHOLE else word for word in words
    )


def plain_text(text: str) -> str:
    """Neutralise markup, links and control characters."""
    shown = printable(text).translate(MARKUP)
    return ADDRESS.sub(lambda match: match[0] + NO_LINK, shown)
