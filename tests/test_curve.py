"""Pictures of training curves."""

import json
from pathlib import Path

import numpy as np
import pytest

from autorefiner.refiner.training.curve import HEIGHT, INK, SMOOTH, TITLE, WIDTH, draw_curve

from decoding import decoded_picture


@pytest.fixture
def drawn(tmp_path: Path):
    """Draw the rows of a log; return the picture as ffmpeg decodes it."""

    def draw(rows: list[dict]) -> np.ndarray:
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        draw_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
        return decoded_picture(tmp_path / "loss.png")

    return draw


def title(panel: np.ndarray) -> np.ndarray:
    """Return the band above a curve, within its frame."""
    return panel[1:TITLE, 1:-1]


def test_every_figure_has_a_panel_with_its_name(drawn) -> None:
    rows = [
        {"step": i, "loss": 10.0 - i, "seconds": 1.0} | ({"reward": i} if i % 2 else {})
        for i in range(9)
    ]
    image = drawn(rows)
    assert image.shape == (2 * HEIGHT, WIDTH, 3)
    first, second = image[:HEIGHT], image[HEIGHT:]
    assert (first == SMOOTH).all(-1).any()
    assert (title(first) == INK).all(-1).any()
    assert (title(first) != title(second)).any()
    assert np.array_equal(drawn([{**row, "gain": row["loss"]} for row in rows])[:HEIGHT], first)


def test_falling_values_fall_in_the_picture(drawn) -> None:
    heights = (
        (drawn([{"step": i, "loss": float(-i)} for i in range(20)]) == SMOOTH).all(-1).argmax(0)
    )
    assert heights[100] < heights[300] < heights[500]


def test_a_figure_of_one_step_is_seen(drawn) -> None:
    drawing = drawn([{"step": 7, "loss": 3.0}])
    assert (drawing == SMOOTH).all(-1).any()


def test_a_curve_stays_below_its_title(drawn) -> None:
    values = np.random.default_rng(0).normal(size=400).tolist()
    drawing = drawn([{"step": i, "loss": value} for i, value in enumerate([*values, 1e9])])
    assert (drawing[:TITLE] != SMOOTH).any(-1).all()


@pytest.mark.parametrize("name", ["held-out " * 40, "数" * 200, "a\nb"])
def test_a_title_stays_on_its_panel_and_keeps_the_value(name: str, drawn) -> None:
    one, other = (
        drawn([{"step": 0, name: value}, {"step": 1, name: value}]) for value in (1.0, 2.0)
    )
    assert one.shape == (HEIGHT, WIDTH, 3)
    written = (title(one) != 255).any(-1)
    assert written.any() and not written[:, -7:].any()
    assert not written[[0, -1]].any()
    assert (title(one) != title(other)).any()
