"""Curves of a log as a picture."""

import json

import numpy as np
import pytest

from autorefiner.refiner.training import curve
from autorefiner.refiner.training.curve import GLYPHS, HEIGHT, INK, SMOOTH, WIDTH, draw_curve


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws rows of a log and gives the picture."""
    pictures = []
    monkeypatch.setattr(curve, "write_png", lambda image, path: pictures.append(image))

    def draw(rows: list[dict]) -> np.ndarray:
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        draw_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
        return pictures[-1]

    return draw


def test_every_figure_has_a_panel_with_its_name(drawn) -> None:
    rows = [{"step": i, "loss": 10.0 - i, "seconds": 1.0} | ({"reward": i} if i % 2 else {}) for i in range(9)]
    image = drawn(rows)
    assert image.shape == (2 * HEIGHT, WIDTH, 3)
    first, second = image[:HEIGHT], image[HEIGHT:]
    assert (first == SMOOTH).all(-1).any()
    inked = [(panel == INK).all(-1) for panel in (first, second)]
    assert inked[0].any()
    assert (inked[0] != inked[1]).any()
    assert not (drawn([{**row, "gain": row["loss"]} for row in rows])[:HEIGHT] != first).any()


def test_falling_values_fall_in_the_picture(drawn) -> None:
    heights = (drawn([{"step": i, "loss": float(-i)} for i in range(20)]) == SMOOTH).all(-1).argmax(0)
    assert heights[100] < heights[300] < heights[500]


def test_letters_are_all_different() -> None:
    assert len(set(GLYPHS.values())) == len(GLYPHS)
    assert all(len(rows) == 5 for rows in GLYPHS.values())
