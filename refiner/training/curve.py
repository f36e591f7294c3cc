"""Loss and reward curves as a picture: one panel a logged figure, with its name and last value, raw under smoothed."""

from pathlib import Path

import numpy as np

from ..pictures import write_png
from .log import read_rows

WIDTH, HEIGHT, MARGIN = 640, 160, 8
RAW, SMOOTH, FRAME, INK = (205, 215, 235), (30, 70, 160), (190, 190, 190), (60, 60, 60)
HIDDEN = ("step", "seconds")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.-+"
DOTS = """
25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 65555 25552 65644 25573 65655 34216 72222
55557 55552 55775 55255 55222 71247 75557 26227 71747 71717 55711 74717 74757 71122 75757 75717 00002 00700 02720
"""
GLYPHS = dict(zip(LETTERS, DOTS.split(), strict=True))  # of 3x5 dots: a digit a row, whose bits are the dots


def draw_curve(log: Path, path: Path) -> None:
    """Draw every figure of a log.jsonl over the steps into a PNG, in the order of its first appearance."""
    rows = read_rows(log)
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in HIDDEN]
    last = rows[-1]["step"]
    panels = [_panel(name, [(row["step"], row[name]) for row in rows if name in row], last) for name in names]
    write_png(np.concatenate(panels), path)


def _panel(name: str, points: list[tuple[int, float]], last: int) -> np.ndarray:
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
    _write(image, f"{name} {smoothed[-1]:.4g}")
    return image


def _write(image: np.ndarray, text: str) -> None:
    """Put a text into the upper left corner."""
    for place, letter in enumerate(text.lower()[: (WIDTH - 2 * MARGIN) // 8]):
        dots = np.array([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in GLYPHS.get(letter, "00000")], bool)
        left = MARGIN + 8 * place
        image[MARGIN : MARGIN + 10, left : left + 6][dots.repeat(2, 0).repeat(2, 1)] = INK


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a fiftieth of the run."""
    width = min(len(values), max(1, len(values) // 50))
    total = np.cumsum(np.concatenate(([0.0], values)))
    right = np.arange(1, len(values) + 1)
    left = np.maximum(right - width, 0)
    return (total[right] - total[left]) / (right - left)
