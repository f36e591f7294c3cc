"""Tables of many clips' scores: means, totals weighted as in VBench, bootstrap intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .evaluate import QUALITY, ROWS, SEMANTIC, ClipScores

DYNAMIC_WEIGHT = 0.5  # of dynamic among the quality rows, as in VBench
TOTALS = ("quality", "semantic", "total")
RESAMPLES = 2000
LEVEL = 0.95
TAILS = (1 - LEVEL) / 2, (1 + LEVEL) / 2  # quantiles of an interval's ends


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.mean):
            return "–"
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"


def resampled_interval(values: ndarray, statistic: Callable[[ndarray], float]) -> Interval:
    """Return a statistic of values [n, …] with its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile([statistic(values[rows]) for rows in drawn], TAILS)
    return Interval(float(statistic(values)), float(low), float(high))


Summary = dict[str, Interval]  # by row, in the order of ROWS, then TOTALS


def with_totals(means: ndarray) -> ndarray:
    """Append quality, semantic and total to row means: [..., 12] to [..., 15].

    total = (4 · quality + semantic) / 5. Rows that no clip has (NaN) do not count.
    """
    weights = np.where(np.array(ROWS) == "dynamic", DYNAMIC_WEIGHT, 1.0)
    there = ~np.isnan(means)
    totals = []
    for names in (QUALITY, SEMANTIC):
        chosen = weights * np.isin(ROWS, names) * there
        totals.append((np.nan_to_num(means) * chosen).sum(axis=-1) / chosen.sum(axis=-1))
    quality, semantic = totals
    totals.append((4 * quality + semantic) / 5)
    return np.concatenate([means, np.stack(totals, axis=-1)], axis=-1)


def totals_of(scores: ClipScores) -> dict[str, float]:
    """Return one clip's quality, semantic and total; semantic is NaN if nothing is stated."""
    return dict(zip(TOTALS, with_totals(scores.array)[-len(TOTALS) :].tolist(), strict=True))


def _resampled(scores: Sequence[ClipScores], groups: Sequence[int] | None) -> ndarray:
    """Return means and totals of all clips, then of each resample: [1 + RESAMPLES, 15].

    Groups, as of a caption's clips, are drawn as a whole. The draws depend on the number of groups
    alone, so paired sets of scores are resampled alike.
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
    summary = {}
    for name, column in zip((*ROWS, *TOTALS), draws.T, strict=True):
        known = column[1:][~np.isnan(column[1:])]
        low, high = np.quantile(known, TAILS) if len(known) else (np.nan, np.nan)
        summary[name] = Interval(float(column[0]), float(low), float(high))
    return summary


def summarise(scores: Sequence[ClipScores], groups: Sequence[int] | None = None) -> Summary:
    """Return every row's and total's mean with its interval.

    `groups` holds each clip's caption number; None: every clip is its own group.
    """
    return _summary(_resampled(scores, groups))


def paired_difference(
    scores: Sequence[ClipScores],
    baseline: Sequence[ClipScores],
    groups: Sequence[int] | None = None,
) -> Summary:
    """Return the gain of `scores` over `baseline`, clip by clip; ValueError for unequal numbers."""
    if len(scores) != len(baseline):
        raise ValueError(
            f"{len(scores)} clips against {len(baseline)}:"
            " a paired difference needs the same captions"
        )
    return _summary(_resampled(scores, groups) - _resampled(baseline, groups))


def format_table(columns: Mapping[str, Summary]) -> str:
    """Format summaries as the columns of a Markdown table."""
    lines = [["row", *columns]]
    for name in (*SEMANTIC, *QUALITY, *TOTALS):
        lines.append([name, *(str(column[name]) for column in columns.values())])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format lines of cells, the heading first, as a Markdown table padded for plain text."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    rows = []
    for line in (lines[0], ["-" * width for width in widths], *lines[1:]):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
