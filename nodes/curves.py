"""Figures of a training as the page draws them: a few hundred points, however long it runs."""

from collections.abc import Mapping
from pathlib import Path

from ..refiner.training.log import read_rows

POINTS = 200  # of a curve, at most
MOST_CURVES = 3
HIDDEN = ("step", "seconds")


class Curves:
    """Figures by name over the steps, as means over as many steps as keep them short."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int, float]]] = {}

    @classmethod
    def read(cls, log: Path, before: int) -> "Curves":
        """Of a run that goes on: the rows of its log of the steps before this one."""
        curves = cls()
        for row in read_rows(log, before):
            curves.add(row["step"], {name: value for name, value in row.items() if name not in HIDDEN})
        return curves

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step in."""
        for name, value in figures.items():
            self.values.setdefault(name, []).append((step, value))

    def told(self) -> dict[str, list[list[float]]]:
        """At most MOST_CURVES figures as [step, value], each of at most POINTS points; the loss first."""
        names = sorted(self.values, key=lambda name: (name != "loss", name != "reward"))
        return {name: thinned(self.values[name]) for name in names[:MOST_CURVES]}


def thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    """At most POINTS points: the last step and the mean value of as many neighbours."""
    each = -(-len(points) // POINTS) or 1
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]
