"""Forward and backward pass as a CUDA graph, as small networks are bound by kernel launches."""

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

WARM = 2  # eager passes before the capture: they fill tables and choose kernels
# parameters; in larger networks kernels take longer than launches, and activations much memory
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
    """A captured pass: its graph, static inputs and outputs."""

    graph: "torch.cuda.CUDAGraph"
    inputs: list[Tensor]
    outputs: Outputs
    gradients: list[Tensor | None]  # empty for a pass without gradients


class Replay:
    """Run a function of tensors and its backward pass: eagerly on the CPU, replayed on a GPU.

    A replay repeats the kernels of the first call. So, for the same shapes and `fixed` arguments,
    the function must make the same passes, draw no random numbers, and read nothing that changes
    except its tensors and the parameters. Each kind of call keeps its activations' memory. `eager`
    turns replays off. With `adds`, gradients accumulate, as over a step's micro-batches, until the
    caller sets them to None.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, eager: bool = False, adds: bool = False
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adds, self.replays = adds, device.type == "cuda" and not eager
        self.captured: dict[Hashable, Captured] = {}
        self.tables: Tables = {}  # device tensors that captured passes read in place

    def __call__(self, function: Function, *tensors: Tensor, **fixed: Hashable) -> Outputs:
        """Return `function(*tensors, **fixed)`, a loss first, and set the parameters' gradients."""
        before = [parameter.grad if self.adds else None for parameter in self.parameters]
        captured = self._replay(self._learn, function, tensors, fixed)
        if captured is None:
            for parameter, sum_before in zip(self.parameters, before, strict=True):
                parameter.grad = sum_before
            return self._learn(function, tensors, fixed)
        for parameter, sum_before, gradient in zip(
            self.parameters, before, captured.gradients, strict=True
        ):
            parameter.grad = self._sum(sum_before, gradient)
        return captured.outputs

    def _sum(self, before: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        """Add a replay's gradient, whose memory the next replay overwrites, to the previous one."""
        if gradient is None or not self.adds:
            return before if gradient is None else gradient
        return gradient.clone() if before is None else before.add_(gradient)

    def forward(self, function: Function, *tensors: Tensor, **fixed: Hashable) -> Outputs:
        """Return `function(*tensors, **fixed)` without gradients."""
        captured = self._replay(self._look, function, tensors, fixed)
        return self._look(function, tensors, fixed) if captured is None else captured.outputs

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
        """Replay this kind of call on these tensors, capturing it if needed.

        Its outputs are valid until its next replay. None if replays are off, as after a failed
        capture.
        """
        if not self.replays:
            return None
        shapes = ((tensor.shape, tensor.dtype) for tensor in tensors)
        kind = (run.__name__, function.__name__, *sorted(fixed.items()), *shapes)
        if kind not in self.captured:
            try:
                with holding(self.tables):
                    self.captured[kind] = self._capture(run, function, tensors, fixed)
            # CUDA cannot capture it, or the allocator cannot; the function's errors come up again
            except RuntimeError as error:
                self.replays = False
                reason = str(error).partition("\n")[0]
                warnings.warn(f"passes are not replayed, which is slower: {reason}", stacklevel=2)
                return None
        captured = self.captured[kind]
        for static, new in zip(captured.inputs, tensors, strict=True):
            static.copy_(new)
        captured.graph.replay()
        return captured

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
        gradients = [parameter.grad for parameter in self.parameters] if learns else []
        return Captured(graph, inputs, outputs, gradients)


def replayable(options: RefineOptions, network: CausalWan) -> bool:
    """Return whether a refiner's training repeats its passes, and whether replays pay off.

    A reward draws frames, and a window that drops frames builds indices on the device, as other
    policies do. Several processes, compilation and checkpointing are untested.
    """
    whole, preset = world() == 1, options.preset
    remembers = preset.memory == "window" and not 0 <= preset.window < options.frames
    plain = not (options.checkpointing or options.compiled)
    small = sum(parameter.numel() for parameter in network.model.parameters()) <= SMALL
    return options.objective == "dmd" and whole and remembers and plain and small
