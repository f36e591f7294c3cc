"""Batches prepared by worker processes ahead of their step, so that a GPU need not wait."""

import os
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..stopping import ignore_in_worker

T = TypeVar("T")
MAX_WORKERS = 8
PREFETCH = 2  # batches that each worker prepares ahead


def helpers(device: torch.device) -> int:
    """Return the number of workers for a device: 0 on a CPU, whose cores the model needs."""
    return 0 if device.type == "cpu" else min(MAX_WORKERS, os.cpu_count() or 1)


class Ahead(Generic[T]):
    """Compute `make(index)` ahead of time in `workers` processes, for rising indices below `end`.

    Without workers, compute it on request. `make` must be picklable (a module-level function or a
    partial of one) and depend on the index alone, so that results are the same with any number of
    workers and from any starting index.
    """

    def __init__(self, make: Callable[[int], T], end: int, workers: int = 0) -> None:
        self.make, self.end, self.workers = make, end, workers
        self.next = -1
        self.results: Iterator[T] = iter(())

    def __call__(self, index: int) -> T:
        """Return the result for `index`; a jump in the indices restarts the workers."""
        if not self.workers or index >= self.end:
            return self.make(index)
        if index != self.next:
            self.results = iter(self._loader(index))
        self.next = index + 1
        return next(self.results)

    def _loader(self, start: int) -> DataLoader:
        return DataLoader(
            _Results(self.make, start, self.end), batch_size=None, num_workers=self.workers,
            prefetch_factor=PREFETCH, collate_fn=_identity, worker_init_fn=ignore_in_worker,
        )  # fmt: skip


class _Results(Dataset):
    """The results of a function as a data set."""

    def __init__(self, make: Callable[[int], T], start: int, end: int) -> None:
        self.make, self.start, self.end = make, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, place: int) -> T:
        return self.make(self.start + place)


def _identity(result: T) -> T:
    return result
