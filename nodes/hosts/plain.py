"""Make text safe for ComfyUI's page, which shows a node's text as HTML and links addresses."""

import re

from ...refiner.terminal import printable

MARKUP = str.maketrans({"<": "‹", ">": "›", "&": "＆", '"': "”"})
# Addresses, [[label|url]], and the page's own placeholder __LNK0__, at which it would fail.
ADDRESS = re.compile(r":(?=//)|www(?=\.)|\[(?=\[)|__(?=LNK)", re.IGNORECASE)
NO_LINK = "\u2060"  # a word joiner, which is invisible


def plain_text(text: str) -> str:
    """Neutralise markup, links and control characters."""
    shown = printable(text).translate(MARKUP)
    return ADDRESS.sub(lambda match: match[0] + NO_LINK, shown)
