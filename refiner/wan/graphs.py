"""CUDA graphs: capture work on the device once, then replay it; sampling replays whole passes."""

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .causal import CausalWan, KeyValue, PassInputs, View, cached_features, run_pass
from .rope import rotations
from .upload import Tables

# parameters; in larger networks kernels take longer than launches
SMALL = 100_000_000
MOST = 64  # graphs of a run, and kinds of pass that may become one
CAPTURING = threading.RLock()  # held by the thread that captures

Result = TypeVar("Result")


@contextmanager
def holding(tables: Tables) -> Iterator[None]:
    """Keep every table that a pass inside asks for in `tables`."""
    caches = (cached_features, rotations)
    before = [cache.held for cache in caches]
    for cache in caches:
        cache.held = tables
    try:
        yield
    finally:
        for cache, held in zip(caches, before, strict=True):
            cache.held = held


def outside_captures(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function for other threads that waits while a graph is captured.

    Compiling a kernel synchronises the device, which a capture on any stream forbids.
    """

    def run(*arguments: object) -> Result:
        with CAPTURING:
            return function(*arguments)

    return run


@lru_cache
def capture_stream(device: int) -> "torch.cuda.Stream":
    """Return the stream of a device that all captures use, and nothing else.

    torch deals out 32 streams of each priority in turn, so one of the usual priority may also be
    another thread's, whose work would be captured with ours. Its cuBLAS workspace stays.
    """
    return torch.cuda.Stream(device, priority=-1)


def capture(
    function: Callable[[], Result], warm: int, pool: object = None
) -> tuple["torch.cuda.CUDAGraph", Result]:
    """Capture a function's work on the current device; replays overwrite the returned result.

    It first runs `warm` times, which fills tables and chooses kernels, and allocates workspaces,
    which must not lie in the graph's memory. Other threads may go on using the device, but for
    what is `outside_captures`.
    """
    here, aside = torch.cuda.current_stream(), capture_stream(torch.cuda.current_device())
    with CAPTURING, torch.cuda.stream(here):  # a capture that fails leaves another stream behind
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(warm):
                function()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        options = dict(pool=pool, stream=aside, capture_error_mode="thread_local")
        with torch.cuda.graph(graph, **options):
            result = function()
    return graph, result


def give_up(error: RuntimeError) -> None:
    """Warn that passes are not replayed."""
    reason = str(error).partition("\n")[0]
    warnings.warn(f"passes are not replayed, which is slower: {reason}", stacklevel=3)


class ReplayedPass(NamedTuple):
    """A captured pass: its graph, and the tensors that it reads and writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: PassInputs
    flow: Tensor | None
    view: View  # owns the memory that the graph uses


class Replays:
    """Replays passes without gradients that repeat from chunk to chunk (`CausalWan.execute`).

    Passes repeat once the window is full: the slots that a chunk takes go round. A large network's
    pass is captured when another chunk has made the same one before, a small one's when it comes
    again, as its launches take longer than its kernels. Valid for one run: memory and weights must
    stay where they are. A prompt switch begins anew. Where a pass cannot be captured, a warning
    says so once, and all passes run as usual.
    """

    def __init__(self, network: CausalWan, pool: object = None) -> None:
        parameters = sum(parameter.numel() for parameter in network.model.parameters())
        self.small, self.on = parameters <= SMALL, True
        self.pool = pool  # of the graphs' memory, which they share: replays never overlap
        self.text: list[KeyValue] | None = None
        self.seen: dict[Hashable, tuple[int, ...]] = {}  # by kind of pass, the chunk that made it
        self.captured: dict[Hashable, ReplayedPass] = {}
        self.former: list[ReplayedPass] = []  # of the prompt before
        self.tables: Tables = {}  # device tensors that graphs read in place

    def __call__(
        self,
        network: CausalWan,
        inputs: PassInputs,
        text: list[KeyValue],
        view: View,
        keys_only: bool = False,
    ) -> Tensor | None:
        """Run or replay a pass; see `refiner.wan.causal.run_pass`."""
        replayed = self._replayed(network, inputs, text, view, keys_only)
        if replayed is None:
            return run_pass(network, inputs, text, view, keys_only)
        for static, new in zip(replayed.inputs, inputs, strict=True):
            static.copy_(new)
        replayed.graph.replay()
        # the next replay of any graph may overwrite it
        return None if replayed.flow is None else replayed.flow.clone()

    def free(self) -> None:
        """Free the graphs."""
        self._forget(None)
        self.former = []

    def _forget(self, text: list[KeyValue] | None) -> None:
        """Begin anew with this text.

        The graphs stay until another one is captured, as their pool ends with its last graph.
        """
        self.former += self.captured.values()
        self.seen.clear()
        self.captured.clear()
        self.tables.clear()
        self.text = text

    def _replayed(
        self,
        network: CausalWan,
        inputs: PassInputs,
        text: list[KeyValue],
        view: View,
        keys_only: bool,
    ) -> ReplayedPass | None:
        """Return the graph of this kind of pass, captured if it repeats; None if it does not."""
        kind = view.kind if self.on else None
        if kind is None or torch.is_grad_enabled():
            return None
        if text is not self.text:
            self._forget(text)
        key = (kind.places, keys_only, *((each.shape, each.dtype) for each in inputs))
        if key not in self.captured:
            if not self._repeats(key, kind.chunk):
                return None
            try:
                self.captured[key] = self._capture(network, inputs, text, view, keys_only)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.on = False
                self.free()
                give_up(error)
                return None
            self.former = []
            drop_oldest(self.captured)
        return self.captured[key]

    def _repeats(self, key: Hashable, chunk: tuple[int, ...]) -> bool:
        if key in self.seen:
            return self.small or self.seen[key] != chunk
        self.seen[key] = chunk
        drop_oldest(self.seen)
        return False

    def _capture(
        self,
        network: CausalWan,
        inputs: PassInputs,
        text: list[KeyValue],
        view: View,
        keys_only: bool,
    ) -> ReplayedPass:
        static = PassInputs(*(each.clone() for each in inputs))
        with torch.cuda.device_of(static.x), holding(self.tables):
            graph, flow = capture(
                lambda: run_pass(network, static, text, view, keys_only), 1, self.pool
            )
        return ReplayedPass(graph, static, flow, view)


def drop_oldest(entries: dict) -> None:
    """Keep at most `MOST` entries."""
    if len(entries) > MOST:
        del entries[next(iter(entries))]


def shared_pool(device: torch.device) -> object:
    """Return a memory pool for several graphs; None on a CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
