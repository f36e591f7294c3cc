"""Text of unknown origin for ComfyUI's page, which shows a node's text as HTML and turns addresses into links."""

import re

from ...refiner.terminal import printable

MARKUP = str.maketrans({"<": "‹", ">": "›", "&": "＆", '"': "”"})
ADDRESS = re.compile(r"(:|www)(//|\.)", re.IGNORECASE)
NO_LINK = "\u2060"  # a word joiner, which is not seen


def plain_text(text: str) -> str:
    """The same text for a reader, without markup, links or control characters."""
    shown = printable(text).translate(MARKUP)
    return ADDRESS.sub(lambda match: f"{match[1]}{NO_LINK}{match[2]}", shown)
