"""A training's log: a line of JSON a step, of which whatever is damaged is left out."""

import json
import math
import warnings
from pathlib import Path

from ..reading import LINES_BYTES, read_bytes

LARGEST = 1e300  # of a figure
Row = dict[str, float]  # figures of a step by name, with `step` and `seconds`


def read_rows(log: Path, before: float = math.inf) -> list[Row]:
    """Read the rows of the steps before `before`, in the order of the file; none where there is no
    file.

    Warns of damaged lines, which are left out; a last line without its end is one that a kill cut
    off, and is left out silently. ValueError for what is no regular file or longer than any log.
    """
    if not log.exists():
        return []
    *lines, _ = read_bytes(log, LINES_BYTES).split(b"\n")
    rows = [_row(line) for line in lines]
    if damaged := rows.count(None):
        warnings.warn(f"{log} has {damaged} damaged lines: they are left out", stacklevel=2)
    return [row for row in rows if row is not None and row["step"] < before]


def format_row(row: Row) -> str:
    """Format a row as a line of the log."""
    return json.dumps(row) + "\n"


def _row(line: bytes) -> Row | None:
    """Parse a line; None for a damaged one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    return row if all(map(_is_figure, row.values())) else None


def _is_figure(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST
