"""Scores of many clips to a table: means, totals as VBench weighs them, and bootstrap intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .evaluate import QUALITY, ROWS, SEMANTIC, ClipScores

DYNAMIC_WEIGHT = 0.5  # of dynamic among the quality rows, as in VBench
TOTALS = ("quality", "semantic", "total")
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            "–" if np.isnan(self.mean) else f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"
        )


def resampled_interval(values: ndarray, statistic: Callable[[ndarray], float]) -> Interval:
    """A statistic of values [n, …], and its 95 % bootstrap interval over them."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(
        [statistic(values[rows]) for rows in drawn], ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    )
    return Interval(float(statistic(values)), float(low), float(high))


Summary = dict[str, Interval]  # by row: those of ROWS, then of TOTALS


def with_totals(means: ndarray) -> ndarray:
    """Row means [..., 12] with quality, semantic and total = (4 · quality + semantic) / 5 after
    them: [..., 15].

    A row that no clip has (NaN) is left out of its mean.
    """
    weights = np.where(np.array(ROWS) == "dynamic", DYNAMIC_WEIGHT, 1.0)
    there = ~np.isnan(means)
    totals = []
    for names in (QUALITY, SEMANTIC):
        chosen = weights * np.isin(ROWS, names) * there
        totals.append((np.nan_to_num(means) * chosen).sum(axis=-1) / chosen.sum(axis=-1))
    quality, semantic = totals
    return np.concatenate(
        [means, np.stack([quality, semantic, (4 * quality + semantic) / 5], axis=-1)], axis=-1
    )


def _resampled(scores: Sequence[ClipScores], groups: Sequence[int] | None) -> ndarray:
    """Means and totals of all clips, then of each resample of them: [1 + RESAMPLES, 15].

    Clips of one group, as of one caption, are drawn together. The draws depend on the number of
    groups alone, so two sets of scores of the same clips are resampled alike.
    """
    if not scores:
        raise ValueError("no scores: evaluate at least one clip")
    if groups is not None and len(groups) != len(scores):
        raise ValueError(f"{len(groups)} groups for {len(scores)} clips: give one a clip, or none")
    values = np.stack([one.array for one in scores])
    _, group = np.unique(range(len(scores)) if groups is None else groups, return_inverse=True)
    member = (group == np.arange(group.max() + 1)[:, None]).astype(float)
    sums, counts = member @ np.nan_to_num(values), member @ ~np.isnan(values)
    drawn = np.random.default_rng(0).multinomial(
        len(member), np.full(len(member), 1 / len(member)), RESAMPLES
    )
    times = np.concatenate([np.ones((1, len(member))), drawn])
    with np.errstate(invalid="ignore"):
        return with_totals((times @ sums) / (times @ counts))


def _summary(draws: ndarray) -> Summary:
    found = {}
    for name, column in zip((*ROWS, *TOTALS), draws.T, strict=True):
        known = column[1:][~np.isnan(column[1:])]
        low, high = (
            np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
            if len(known)
            else (np.nan, np.nan)
        )
        found[name] = Interval(float(column[0]), float(low), float(high))
    return found


def summarise(scores: Sequence[ClipScores], groups: Sequence[int] | None = None) -> Summary:
    """Means with intervals of every row and total. `groups` names the caption of each clip where it
    has several."""
    return _summary(_resampled(scores, groups))


def paired_difference(
    scores: Sequence[ClipScores],
    baseline: Sequence[ClipScores],
    groups: Sequence[int] | None = None,
) -> Summary:
    """What `scores` gain over `baseline`, clip by clip of the same captions; ValueError for unequal
    numbers."""
    if len(scores) != len(baseline):
        raise ValueError(
            f"{len(scores)} clips against {len(baseline)}: a paired difference needs the same captions"
        )
    return _summary(_resampled(scores, groups) - _resampled(baseline, groups))


def format_table(columns: Mapping[str, Summary]) -> str:
    """A Markdown table, aligned as plain text too: a line a row, a column a summary."""
    names = (*SEMANTIC, *QUALITY, *TOTALS)
    lines = [
        ["row", *columns],
        *[[name, *(str(column[name]) for column in columns.values())] for name in names],
    ]
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells, whose first line is the heading, aligned as plain text too."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    whole = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in whole
    )
