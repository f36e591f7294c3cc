"""Logged figures of a training, thinned to a few hundred points for the page to draw."""

from collections.abc import Mapping
from pathlib import Path

from ..refiner.training.log import read_rows

POINTS = 200  # a curve, at most
MOST_CURVES = 3
HIDDEN = ("step", "seconds")


class Curves:
    """Figures by name as (step, value), thinned when they are read."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int, float]]] = {}

    @classmethod
    def read(cls, log: Path, before: int) -> "Curves":
        """Curves of a resumed run: its log's rows of the steps before `before`."""
        curves = cls()
        for row in read_rows(log, before):
            curves.add(
                row["step"], {name: value for name, value in row.items() if name not in HIDDEN}
            )
        return curves

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.values.setdefault(name, []).append((step, value))

    def points(self) -> dict[str, list[list[float]]]:
        """At most POINTS points [step, value] of at most MOST_CURVES figures, the loss first."""
        names = sorted(self.values, key=lambda name: (name != "loss", name != "reward"))
        return {name: thinned(self.values[name]) for name in names[:MOST_CURVES]}


def thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    """Average groups of neighbours to at most POINTS points, each at its group's last step."""
    each = -(-len(points) // POINTS) or 1
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]
