"""How far a run is, counted in predictions, for progress bars and the page."""

from collections.abc import Sequence

from ..refiner.rollout import Progress
from ..refiner.samplers import SAMPLERS, SelfRefine
from ..refiner.schedule import Chunk, Level, plan_chunks
from .run import Run


class Passes:
    """Predictions of a run: `done` of `total`, and `made` of `needed` of the chunk in the making.

    A method that repeats a level until it is sure may do with fewer; then the count goes on with the next level.
    """

    def __init__(self, run: Run) -> None:
        method = SAMPLERS.get(run.method)
        self.repeats = method.repeats if isinstance(method, SelfRefine) else {}
        self.candidates = run.search.candidates if run.search else 1
        self.total = self.done = self.begun = self.needed = 0
        self.before: dict[int, int] = {}  # the chunk of an index
        for chunk in plan_chunks(run.plan.preset, run.plan.frames, run.plan.given)[1]:
            self.before[chunk.index] = self.total
            self.total += self.of_chunk(chunk)

    def of_chunk(self, chunk: Chunk) -> int:
        """Predictions of a chunk, at most."""
        return self.candidates * self.of_levels(chunk.levels)

    def of_levels(self, levels: Sequence[Level]) -> int:
        """Predictions of one candidate at these levels, at most."""
        return sum(1 + self.repeats.get(level.step, 0) for level in levels)

    def step(self, progress: Progress) -> None:
        """Count a prediction."""
        chunk = progress.chunk
        self.begun, self.needed = self.before[chunk.index], self.of_chunk(chunk)
        self.done = max(self.done, self.begun + self.of_levels(chunk.levels[: progress.level])) + 1

    @property
    def made(self) -> int:
        """Predictions of the chunk in the making."""
        return self.done - self.begun
