"""Loss and reward curves as a picture: one panel for each logged figure, titled with its value."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..pictures import write_png
from .log import read_rows

WIDTH, HEIGHT, MARGIN = 640, 160, 8
TITLE, FONT_SIZE = 24, 14  # heights of the band above a curve and of its letters
DOT = 2  # radius of the last value's dot
RAW, SMOOTH, FRAME, INK = (205, 215, 235), (30, 70, 160), (190, 190, 190), (60, 60, 60)
HIDDEN = ("step", "seconds")


def draw_curve(log: Path, path: Path) -> None:
    """Draw every figure of a log.jsonl over the steps into a PNG, in order of first appearance."""
    rows = read_rows(log)
    names = [
        name for name in dict.fromkeys(name for row in rows for name in row) if name not in HIDDEN
    ]
    last = rows[-1]["step"]
    panels = [
        _panel(name, [(row["step"], row[name]) for row in rows if name in row], last)
        for name in names
    ]
    write_png(np.concatenate(panels), path)


def _panel(name: str, points: list[tuple[int, float]], last: int) -> np.ndarray:
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(panel)
    draw.rectangle((0, 0, WIDTH - 1, HEIGHT - 1), outline=FRAME)
    steps, values = np.array(points, np.float64).T
    smoothed = _smooth(values)
    _write_title(draw, name, f"{smoothed[-1]:.4g}")
    low, high = np.percentile(values, [1, 99])
    x = MARGIN + steps / max(last, 1) * (WIDTH - 2 * MARGIN - 1)
    for line, colour in ((values, RAW), (smoothed, SMOOTH)):
        heights = ((line - low) / (high - low)).clip(0, 1) if high > low else 0 * line + 0.5
        y = HEIGHT - MARGIN - 1 - heights * (HEIGHT - TITLE - MARGIN - DOT - 1)
        draw.line([*zip(x, y, strict=True)], fill=colour)
    end = (x[-1] - DOT, y[-1] - DOT, x[-1] + DOT, y[-1] + DOT)
    draw.ellipse(end, fill=SMOOTH)  # a line of one point would be invisible
    return np.asarray(panel)


def _write_title(draw: ImageDraw.ImageDraw, name: str, value: str) -> None:
    """Write name and value above the curve; a name that does not fit is cut."""
    font = ImageFont.load_default(FONT_SIZE)
    name = " ".join(name.split())
    title = f"{name}  {value}"
    while font.getlength(title) > WIDTH - 2 * MARGIN:
        name = name[:-1]
        title = f"{name}...  {value}"
    draw.text((MARGIN, TITLE / 2), title, fill=INK, font=font, anchor="lm")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over the last fiftieth of the run."""
    width = min(len(values), max(1, len(values) // 50))
    total = np.cumsum(np.concatenate(([0.0], values)))
    right = np.arange(1, len(values) + 1)
    left = np.maximum(right - width, 0)
    return (total[right] - total[left]) / (right - left)
