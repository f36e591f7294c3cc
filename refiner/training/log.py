"""A training's log: one line of JSON per step; damaged lines are skipped."""

import json
import math
import warnings
from pathlib import Path

from ..reading import LINES_BYTES, read_bytes

LARGEST = 1e300  # figures beyond it are damage
Row = dict[str, float]  # a step's figures by name, with `step` and `seconds`


def read_rows(log: Path, before: float = math.inf) -> list[Row]:
    """Read the rows of steps below `before` in file order; an empty list if there is no file.

    Damaged lines are skipped with a warning; an unterminated last line, as after a kill, silently.
    ValueError if the path is no regular file or longer than any log.
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
