"""Print untrusted text without letting it control the terminal."""

import sys
import unicodedata
from typing import TextIO

LONGEST = 4000  # characters of a line


def printable(text: str) -> str:
    """Escape invisible characters, turn tabs into spaces and cut text that is too long.

    Invisible are control characters, line and paragraph separators, directional overrides and
    surrogates.
    """
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return "".join(map(_visible, shown))


def _visible(character: str) -> str:
    if character == "\t":
        return " "
    kind = unicodedata.category(character)
    if not kind.startswith("C") and kind not in ("Zl", "Zp"):
        return character
    return character.encode("unicode_escape").decode("ascii")


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print each text on one line, on stdout by default."""
    print("\n".join(map(printable, lines)), file=file or sys.stdout)


def warn(*lines: str) -> None:
    """Print each text on one line of stderr."""
    say(*lines, file=sys.stderr)
