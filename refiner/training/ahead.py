"""Batches that processes make ahead of their step, where a GPU would wait for them."""

import os
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..stopping import ignore_in_worker

T = TypeVar("T")
MOST = 8  # processes
EACH = 2  # batches that each of them is ahead


def helpers(device: torch.device) -> int:
    """Processes that make batches for a model on this device: none where it needs the cores
    itself."""
    return 0 if device.type == "cpu" else min(MOST, os.cpu_count() or 1)


class Ahead(Generic[T]):
    """`make(index)` for rising indices below `end`, made by `workers` processes before it is asked
    for.

    Without workers it is made when asked. `make` is a module's function, or a partial one, and what
    it gives depends on the index alone; so it is the same with any number of workers, and from any
    index on.
    """

    def __init__(self, make: Callable[[int], T], end: int, workers: int = 0) -> None:
        self.make, self.end, self.workers = make, end, workers
        self.next = -1
        self.made: Iterator[T] = iter(())

    def __call__(self, index: int) -> T:
        """What belongs to `index`; after another one than the last and one the processes begin
        anew."""
        if not self.workers or index >= self.end:
            return self.make(index)
        if index != self.next:
            self.made = iter(self._loader(index))
        self.next = index + 1
        return next(self.made)

    def _loader(self, start: int) -> DataLoader:
        made = _Made(self.make, start, self.end)
        return DataLoader(
            made, batch_size=None, num_workers=self.workers, prefetch_factor=EACH, collate_fn=_as_it_is,
            worker_init_fn=ignore_in_worker,
        )  # fmt: skip


class _Made(Dataset):
    """The results of a function as a data set."""

    def __init__(self, make: Callable[[int], T], start: int, end: int) -> None:
        self.make, self.start, self.end = make, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, place: int) -> T:
        return self.make(self.start + place)


def _as_it_is(made: T) -> T:
    return made
