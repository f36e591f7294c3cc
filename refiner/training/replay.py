"""Forward and backward pass as a CUDA graph, as small networks are bound by kernel launches."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..wan.causal import CausalWan
from ..wan.graphs import SMALL, capture, give_up, holding
from ..wan.upload import Tables
from .distributed import world
from .options import RefineOptions

WARM = 2  # eager passes before the capture: they fill tables and choose kernels

Outputs = Sequence[Tensor] | dict[str, Tensor]
Function = Callable[..., Outputs]


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
                give_up(error)
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

        def once() -> Outputs:
            self._forget()
            return run(function, inputs, fixed)

        with torch.cuda.device_of(self.parameters[0]):
            graph, outputs = capture(once, WARM)
        learns = run == self._learn
        gradients = [parameter.grad for parameter in self.parameters] if learns else []
        return Captured(graph, inputs, outputs, gradients)


def replayable(options: RefineOptions, network: CausalWan) -> bool:
    """Return whether a refiner's training repeats its passes, and whether replays pay off.

    A reward draws frames, and a window that drops frames builds indices on the device, as other
    policies do. Several processes, compilation and checkpointing are untested. Activations of a
    larger network take much memory.
    """
    whole, preset = world() == 1, options.preset
    remembers = preset.memory == "window" and not 0 <= preset.window < options.frames
    plain = not (options.checkpointing or options.compiled)
    small = sum(parameter.numel() for parameter in network.model.parameters()) <= SMALL
    return options.objective == "dmd" and whole and remembers and plain and small
