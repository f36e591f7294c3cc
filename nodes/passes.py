"""How far a run is, counted in predictions, for progress bars and the page."""

from collections import Counter
from dataclasses import replace

from ..refiner.rollout import Progress
from ..refiner.schedule import Chunk
from .run import Run


class Passes:
    """Predictions of a run: `done` of `total`, and `done_of_chunk` of `needed` of the chunk in the
    making.

    A method that is not exact may make fewer at a level; then the count goes on with the next
    level.
    """

    def __init__(self, run: Run) -> None:
        self.method = run.sampler()
        self.total = self.done = self.done_of_chunk = self.needed = 0
        self.before: dict[int, int] = {}  # predictions of earlier chunks, by a chunk's index
        self.counts: Counter[int] = Counter()
        for chunk in run.plan.chunks:
            self.before[chunk.index] = self.total
            self.total += self.method.passes(chunk)

    def step(self, progress: Progress) -> None:
        """Count a prediction."""
        chunk, index = progress.chunk, progress.chunk.index
        skipped = 0 if self.method.exact else self._before_level(chunk, progress.level)
        self.needed = self.method.passes(chunk)
        self.counts[index] = self.done_of_chunk = max(self.counts[index], skipped) + 1
        self.done = self.done + 1 if self.method.exact else self.before[index] + self.done_of_chunk

    def _before_level(self, chunk: Chunk, level: int) -> int:
        """Most predictions of a chunk before one of its levels."""
        return self.method.passes(replace(chunk, levels=chunk.levels[:level]))
