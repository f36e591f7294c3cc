"""A loss curve as a picture: one panel a logged figure, thin raw values under a smoothed line."""

import json
from pathlib import Path

import numpy as np

from ..video import write_png

WIDTH, HEIGHT, MARGIN = 640, 160, 8
RAW, SMOOTH, FRAME = (205, 215, 235), (30, 70, 160), (190, 190, 190)
HIDDEN = ("step", "seconds")


def draw_curve(log: Path, path: Path) -> None:
    """Draw every figure of a log.jsonl over the steps into a PNG, in the order of its first appearance."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in HIDDEN]
    panels = [_panel([(row["step"], row[name]) for row in rows if name in row], rows[-1]["step"]) for name in names]
    write_png(np.concatenate(panels), path)


def _panel(points: list[tuple[int, float]], last: int) -> np.ndarray:
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    image[[0, -1]] = image[:, [0, -1]] = FRAME
    steps, values = np.array(points).T
    smoothed = _smooth(values)
    low, high = np.percentile(values, [1, 99])
    for line, colour in ((values, RAW), (smoothed, SMOOTH)):
        x = MARGIN + steps / max(last, 1) * (WIDTH - 2 * MARGIN - 1)
        y = HEIGHT - MARGIN - 1 - (line - low) / max(high - low, 1e-12) * (HEIGHT - 2 * MARGIN - 1)
        columns = np.arange(MARGIN, WIDTH - MARGIN)
        heights = np.interp(columns, x, y).round().clip(1, HEIGHT - 2).astype(int)
        for column, top, bottom in zip(columns[1:], heights, heights[1:], strict=False):
            image[min(top, bottom) : max(top, bottom) + 1, column] = colour
    return image


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a fiftieth of the run."""
    width = min(len(values), max(1, len(values) // 50))
    total = np.cumsum(np.concatenate(([0.0], values)))
    right = np.arange(1, len(values) + 1)
    left = np.maximum(right - width, 0)
    return (total[right] - total[left]) / (right - left)
