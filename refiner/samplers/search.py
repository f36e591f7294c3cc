"""Search for good noise with a verifier, without learning (AutoRefiner, Table 2)."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..memory.reflect import ReflectiveCache
from ..rollout import Rollout
from ..schedule import Chunk, Preset
from .method import Method
from .self_forcing import predict_chunk


class Judge(Protocol):
    """Scores the candidates for each chunk of one run; it may decode them."""

    def score(self, x0: Tensor, chunk: Chunk) -> Tensor:
        """Score a candidate [B, C, F, h, w] for the next chunk; [B], higher is better."""
        ...

    def keep(self, x0: Tensor, chunk: Chunk) -> None:
        """Append the chosen or given chunk [B, C, F, h, w] to the judged video."""
        ...


class Verifier(Protocol):
    """The criterion of a search."""

    def begin(self) -> Judge:
        """Return a judge for a run, before its first chunk."""
        ...


def check_candidates(candidates: int) -> None:
    """Raise ValueError for fewer than two."""
    if candidates < 2:
        raise ValueError(f"{candidates} candidates: a search compares at least 2")


def check_cache(preset: Preset, cache: ReflectiveCache | None) -> None:
    """Raise ValueError for a refiner's cache that Search over Path overwrites."""
    if cache is not None and cache.previous == "pending":
        raise ValueError(
            "Search over Path overwrites the pending keys that this refiner reads: use Best-of-N,"
            " or a refiner trained with the joint cache"
        )


def judge_of(verifier: Verifier, rollout: Rollout) -> Judge:
    """Return a judge that has seen the given chunks, so an extended clip is judged as a whole."""
    judge = verifier.begin()
    for latents, chunk in rollout.given:
        judge.keep(latents, chunk)
    return judge


def score_all(judge: Judge, candidates: Sequence[Tensor], chunk: Chunk) -> Tensor:
    """Score candidates for a chunk; [candidates, B]."""
    return torch.stack([judge.score(x0, chunk) for x0 in candidates])


def best_of_n(verifier: Verifier, candidates: int = 5) -> Method:
    """Sample every chunk several times from other noise and commit the best (Best-of-N)."""
    check_candidates(candidates)

    def run(rollout: Rollout) -> Iterator[Tensor]:
        judge = judge_of(verifier, rollout)
        for chunk in rollout:
            predictions = [predict_chunk(fork, chunk) for fork in rollout.fork(candidates)]
            x0 = rollout.select(predictions, score_all(judge, predictions, chunk))
            judge.keep(x0, chunk)
            rollout.commit(x0, chunk)
            yield x0

    return Method("best-of-n", run, passes=lambda chunk: candidates * len(chunk.levels))


def search_over_path(verifier: Verifier, candidates: int = 5) -> Method:
    """Try several noises at every level and go on from the best prediction (Search over Path).

    Ma et al. 2025. Refuses a refiner that reads pending keys: those in memory are the last
    candidate's.
    """
    check_candidates(candidates)

    def run(rollout: Rollout) -> Iterator[Tensor]:
        judge = judge_of(verifier, rollout)
        for chunk in rollout:
            forks = rollout.fork(candidates)  # per chunk, as an event may have changed the prompt
            x0 = None
            for level in chunk.levels:
                predictions = []
                for fork in forks:
                    x = fork.begin(chunk) if x0 is None else fork.renoise(x0, level, chunk)
                    predictions.append(fork.predict(x, level, chunk))
                x0 = rollout.select(predictions, score_all(judge, predictions, chunk))
            judge.keep(x0, chunk)
            rollout.commit(x0, chunk)
            yield x0

    return Method(
        "search-over-path",
        run,
        passes=lambda chunk: candidates * len(chunk.levels),
        check=check_cache,
    )
