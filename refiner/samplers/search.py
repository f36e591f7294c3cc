"""Search for good noise with a verifier: the controls that spend passes instead of learning (AutoRefiner, Table 2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..memory.reflect import ReflectiveCache
from ..rollout import Rollout
from ..schedule import Chunk


class Judge(Protocol):
    """Follows one run and scores the candidates for its next chunk; it may decode them."""

    def score(self, x0: Tensor, chunk: Chunk) -> Tensor:
        """One number a sample [B], higher is better, of a candidate [B, C, F, h, w] behind what was kept so far."""
        ...

    def keep(self, x0: Tensor, chunk: Chunk) -> None:
        """These latents [B, C, F, h, w] are the chunk that was chosen or given: what comes next goes on from them."""
        ...


class Verifier(Protocol):
    """What a search chooses by."""

    def begin(self) -> Judge:
        """A judge for a run from its first chunk on, a given one where there are any."""
        ...


def check_candidates(candidates: int) -> None:
    """Raise ValueError for fewer than two."""
    if candidates < 2:
        raise ValueError(f"{candidates} candidates: a search compares at least 2")


def check_reads(cache: ReflectiveCache) -> None:
    """Raise ValueError for a refiner's cache that Search over Path overwrites."""
    if cache.previous == "pending":
        raise ValueError(
            "Search over Path overwrites the pending keys that this refiner reads: use Best-of-N, or a refiner"
            " trained with the joint cache"
        )


def judge_of(verifier: Verifier, rollout: Rollout) -> Judge:
    """A judge that stands behind the chunks that were given: a clip that is extended is judged as one video."""
    judge = verifier.begin()
    for latents, chunk in rollout.given:
        judge.keep(latents, chunk)
    return judge


def scores(judge: Judge, made: Sequence[Tensor], chunk: Chunk) -> Tensor:
    """Scores [candidates, B] of candidates for a chunk."""
    return torch.stack([judge.score(one, chunk) for one in made])


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Every chunk is sampled N times from its own noise; the best one becomes history (Best-of-N)."""

    verifier: Verifier
    candidates: int = 5

    def __post_init__(self) -> None:
        check_candidates(self.candidates)

    def __call__(self, rollout: Rollout) -> Iterator[Tensor]:
        """Yield the x0 [B, C, F, h, w] of each chunk."""
        judge = judge_of(self.verifier, rollout)
        for chunk in rollout.chunks:
            made = [self._chunk(fork, chunk) for fork in rollout.fork(self.candidates)]
            x0 = rollout.select(made, scores(judge, made, chunk))
            judge.keep(x0, chunk)
            rollout.commit(x0, chunk)
            yield x0

    @staticmethod
    def _chunk(rollout: Rollout, chunk: Chunk) -> Tensor:
        first, *rest = chunk.levels
        x0 = rollout.predict(rollout.draw(chunk, first), first, chunk)
        for level in rest:
            x0 = rollout.predict(rollout.renoise(x0, level, chunk), level, chunk)
        return x0


@dataclass(frozen=True, slots=True)
class SearchOverPath:
    """At every level several noises are tried, and the best prediction goes on (Search over Path; Ma et al. 2025).

    It does not go together with a refiner that reads pending keys: those in memory are the last candidate's.
    """

    verifier: Verifier
    candidates: int = 5

    def __post_init__(self) -> None:
        check_candidates(self.candidates)

    def __call__(self, rollout: Rollout) -> Iterator[Tensor]:
        """Yield the x0 [B, C, F, h, w] of each chunk."""
        if rollout.refiner is not None:
            check_reads(rollout.refiner.cache)
        judge = judge_of(self.verifier, rollout)
        for chunk in rollout.chunks:
            forks, x0 = rollout.fork(self.candidates), None  # anew, as an event may have changed the prompt
            for level in chunk.levels:
                made = []
                for fork in forks:
                    x = fork.draw(chunk, level) if x0 is None else fork.renoise(x0, level, chunk)
                    made.append(fork.predict(x, level, chunk))
                x0 = rollout.select(made, scores(judge, made, chunk))
            judge.keep(x0, chunk)
            rollout.commit(x0, chunk)
            yield x0
