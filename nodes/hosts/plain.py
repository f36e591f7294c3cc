"""Text of unknown origin for ComfyUI's page, which shows a node's text as HTML and turns addresses into links."""

import re

from ...refiner.terminal import printable

MARKUP = str.maketrans({"<": "‹", ">": "›", "&": "＆", '"': "”"})
# Addresses, [[label|url]], and the placeholder __LNK0__, at which the page fails where it made no such link.
ADDRESS = re.compile(r":(?=//)|www(?=\.)|\[(?=\[)|__(?=LNK)", re.IGNORECASE)
NO_LINK = "\u2060"  # a word joiner, which is not seen


def plain_text(text: str) -> str:
    """Neutralise markup, links and control characters."""
    shown = printable(text).translate(MARKUP)
    return ADDRESS.sub(lambda match: match[0] + NO_LINK, shown)
