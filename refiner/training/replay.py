"""A step's forward and backward pass as a CUDA graph: what holds small networks up is the launching
of kernels."""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..wan.causal import CausalWan, cached_features
from ..wan.rope import rotations
from ..wan.upload import Tables
from .distributed import world
from .options import RefineOptions

WARM = 2  # ordinary passes before the one that is captured: they fill tables and choose kernels
# parameters: of larger networks kernels take longer than launches, and activations much memory
SMALL = 100_000_000

Outputs = Sequence[Tensor] | dict[str, Tensor]
Function = Callable[..., Outputs]


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


class Captured(NamedTuple):
    """One pass: the graph, what it reads, and what it writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: list[Tensor]
    outputs: Outputs
    gradients: list[Tensor | None]  # none at all of a pass without gradients


class Replay:
    """Gradients of a model's parameters by a function of tensors: computed as usual on the CPU,
    replayed on a GPU.

    The function must make the same passes for the same shapes and `fixed` arguments, draw no random
    numbers, and read nothing that changes but its tensors and parameters: a replay repeats the
    kernels of the first call. Each kind of call keeps the memory of its activations. An `eager` one
    replays nothing and asks nothing of the function. With `adds`, gradients add up until someone
    sets them to None, as those of a step's parts.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, eager: bool = False, adds: bool = False
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adds, self.replays = adds, device.type == "cuda" and not eager
        self.captured: dict[Hashable, Captured] = {}
        self.tables: Tables = {}  # on the device; captured passes read them in place

    def __call__(self, function: Function, *tensors: Tensor, **fixed: Hashable) -> Outputs:
        """What `function(*tensors, **fixed)` returns, a loss first, whose gradients now stand in
        the parameters."""
        before = [parameter.grad if self.adds else None for parameter in self.parameters]
        found = self._replay(self._learn, function, tensors, fixed)
        if found is None:
            for parameter, sum_before in zip(self.parameters, before, strict=True):
                parameter.grad = sum_before
            return self._learn(function, tensors, fixed)
        for parameter, sum_before, gradient in zip(
            self.parameters, before, found.gradients, strict=True
        ):
            parameter.grad = self._sum(sum_before, gradient)
        return found.outputs

    def _sum(self, before: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        """A replay's gradient, whose memory the next replay writes, added to the one before."""
        if gradient is None or not self.adds:
            return before if gradient is None else gradient
        return gradient.clone() if before is None else before.add_(gradient)

    def forward(self, function: Function, *tensors: Tensor, **fixed: Hashable) -> Outputs:
        """What `function(*tensors, **fixed)` returns, without gradients."""
        found = self._replay(self._look, function, tensors, fixed)
        return self._look(function, tensors, fixed) if found is None else found.outputs

    def _learn(
        self, function: Function, tensors: Sequence[Tensor], fixed: dict[str, Hashable]
    ) -> Outputs:
        outputs = function(*tensors, **fixed)
        if isinstance(outputs, dict):
            next(iter(outputs.values())).backward()
            return {name: output.detach() for name, output in outputs.items()}
        outputs[0].backward()
        return [output.detach() for output in outputs]

    @torch.no_grad()
    def _look(
        self, function: Function, tensors: Sequence[Tensor], fixed: dict[str, Hashable]
    ) -> Outputs:
        return function(*tensors, **fixed)

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _replay(
        self,
        run: Callable[..., Outputs],
        function: Function,
        tensors: Sequence[Tensor],
        fixed: dict[str, Hashable],
    ) -> Captured | None:
        """The pass of this kind, after it was run on these tensors; what it wrote stands until its
        next run. None where nothing is replayed, as after a capture that failed."""
        if not self.replays:
            return None
        shapes = ((tensor.shape, tensor.dtype) for tensor in tensors)
        kind = (run.__name__, function.__name__, *sorted(fixed.items()), *shapes)
        if kind not in self.captured:
            try:
                with holding(self.tables):
                    self.captured[kind] = self._capture(run, function, tensors, fixed)
            except (
                RuntimeError
            ) as error:  # of CUDA, or of an allocator that cannot; the function's own comes again
                self.replays = False
                warnings.warn(
                    f"passes are not replayed, which is slower: {str(error).partition(chr(10))[0]}",
                    stacklevel=2,
                )
                return None
        found = self.captured[kind]
        for own, new in zip(found.inputs, tensors, strict=True):
            own.copy_(new)
        found.graph.replay()
        return found

    def _capture(
        self,
        run: Callable[..., Outputs],
        function: Function,
        tensors: Sequence[Tensor],
        fixed: dict[str, Hashable],
    ) -> Captured:
        inputs = [tensor.clone() for tensor in tensors]
        learns = run == self._learn
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                self._forget()
                run(function, inputs, fixed)
        here.wait_stream(aside)
        if learns:
            self._forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run(function, inputs, fixed)
        return Captured(
            graph,
            inputs,
            outputs,
            [parameter.grad for parameter in self.parameters] if learns else [],
        )


def replayable(options: RefineOptions, network: CausalWan) -> bool:
    """Whether a refiner's training makes the same passes at every step, and whether they are worth
    replaying.

    A reward draws its frames; a window that forgets frames makes indices on the device; several
    processes, and what is compiled or recomputed in the backward pass, were not tried.
    """
    whole = world() == 1
    remembers = options.preset.window < 0 or options.preset.window >= options.frames
    plain = not (options.checkpointing or options.compiled)
    small = sum(parameter.numel() for parameter in network.model.parameters()) <= SMALL
    return options.objective == "dmd" and whole and remembers and plain and small
