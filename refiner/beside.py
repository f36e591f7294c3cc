"""A stage of a pipeline: work on items in order, in a thread beside the one that makes them."""

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .stopping import settle

Item = TypeVar("Item")
CPU = torch.device("cpu")
POLL = 0.1  # seconds; Windows raises KeyboardInterrupt only between waits


class Stage(Generic[Item]):
    """Call `work` on each item that is `put`, in a thread that holds at most `most` items.

    On a CUDA device the thread has its own stream, which waits for the work queued before `put`.
    The first error drops all later items; the next `put` raises it, or else the exit. Leaving the
    stage waits until all items are done, also after an error elsewhere; an interrupt meanwhile
    drops those that have not begun. No thread is left behind.
    """

    def __init__(
        self,
        work: Callable[[Item], None],
        name: str,
        device: torch.device = CPU,
        most: int = 1,
    ) -> None:
        self.work, self.device = work, device
        self.room = threading.Semaphore(most)
        self.items: queue.SimpleQueue[tuple[Item, torch.cuda.Event | None] | None]
        self.items = queue.SimpleQueue()  # None: the end
        self.error: BaseException | None = None
        self.dropping = False
        self.done = threading.Event()  # an interrupted Thread.join forgets a thread that runs
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> "Stage[Item]":
        self.thread.start()
        return self

    def put(self, item: Item) -> None:
        """Hand over the next item; waits while there is no room. Raises the error of the work."""
        while not self.room.acquire(timeout=POLL):
            self._check()
        self._check()
        self.items.put((item, queued(self.device)))

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            settle()  # caught: a second one is the user's
        self.items.put(None)
        interrupt = None
        while not self.done.is_set():
            try:
                self.done.wait(POLL)
            except KeyboardInterrupt as error:
                settle()
                self.dropping, interrupt = True, error
        self.thread.join()
        if interrupt is not None:
            raise interrupt
        if kind is None:
            self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        """Work until the end; grad mode and stream are a thread's own."""
        try:
            with torch.no_grad(), own_stream(self.device):
                while (handed := self.items.get()) is not None:
                    if self.error is None and not self.dropping:
                        self._work(*handed)
                    del handed  # or it lives until the next item
                    self.room.release()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()

    def _work(self, item: Item, ready: torch.cuda.Event | None) -> None:
        """Work on an item after `ready`; an error is kept for the thread that puts items."""
        try:
            if ready is not None:
                take_over(item, ready)
            self.work(item)
        except BaseException as error:
            self.error = error


def own_stream(device: torch.device) -> AbstractContextManager:
    """Enter a new CUDA stream that begins after what is queued, such as the copy of weights."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(stream)


def queued(device: torch.device) -> torch.cuda.Event | None:
    """Return an event after all work that this thread has queued on a CUDA device."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def take_over(item: object, ready: torch.cuda.Event) -> None:
    """Let this thread's stream wait for an item, whose memory is not reused before it is done."""
    ready.wait()
    if isinstance(item, Tensor) and item.is_cuda:
        item.record_stream(torch.cuda.current_stream())
