"""PNG files: single pictures, and contact sheets of many."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .files import check_output


def contact_sheet(
    frames: Sequence[np.ndarray],
    path: Path,
    columns: int = 8,
    gap: int = 2,
    marks: Sequence[np.ndarray] = (),
) -> None:
    """Write frames [H, W, 3] in rows on white, as a PNG.

    Each row starts with the next of `marks`, pictures [H, any, 3] of one width, taken in turn.
    """
    if not len(frames) or columns < 1:
        raise ValueError(
            f"{len(frames)} frames in {columns} columns: a contact sheet takes at least one of each"
        )
    height, width = frames[0].shape[:2]
    rows = -(-len(frames) // columns)
    wide = marks[0].shape[1] if len(marks) else 0
    margin = wide + gap if wide else 0
    sheet = np.full(
        (rows * (height + gap) + gap, margin + columns * (width + gap) + gap, 3), 255, np.uint8
    )
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), margin + gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = frame
        if margin:
            sheet[top : top + height, gap : gap + wide] = marks[row % len(marks)]
    write_png(sheet, path)


def write_png(image: np.ndarray, path: Path) -> None:
    """Write an RGB image [H, W, 3], uint8, as a PNG; replace an existing file atomically."""
    path = Path(path)
    check_output(path)
    temporary = path.with_name(f".{path.name}.partial")
    Image.fromarray(image).save(temporary, format="png")
    os.replace(temporary, path)
