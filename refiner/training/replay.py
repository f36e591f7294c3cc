"""A step's forward and backward pass as a CUDA graph: what holds small networks up is the launching of kernels."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..wan.causal import known_features
from ..wan.rope import rotations

WARM = 2  # ordinary passes before the one that is captured: they fill caches and choose kernels
TABLES = (rotations, known_features)  # small tensors on the device that a captured pass reads in place


class Captured(NamedTuple):
    """One pass: the graph, what it reads, and what it writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: list[Tensor]
    outputs: Sequence[Tensor]
    gradients: list[Tensor | None]


class Replay:
    """Gradients of a model's parameters by a function of tensors: computed as usual on the CPU, replayed on a GPU.

    The function must make the same passes for the same shapes and `fixed` arguments, draw no random numbers, and read
    nothing that changes but its tensors and parameters: a replay repeats the kernels of the first call. Each kind of
    call keeps the memory of its activations.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.on_gpu = device.type == "cuda"
        self.captured: dict[Hashable, Captured] = {}

    def __call__(
        self, function: Callable[..., Sequence[Tensor]], *tensors: Tensor, **fixed: Hashable
    ) -> Sequence[Tensor]:
        """What `function(*tensors, **fixed)` returns, a loss first, whose gradients now stand in the parameters."""
        if not self.on_gpu:
            return self._run(function, tensors, fixed)
        kind = (function.__name__, *sorted(fixed.items()), *((tensor.shape, tensor.dtype) for tensor in tensors))
        if kind not in self.captured:
            self.captured[kind] = self._capture(function, tensors, fixed)
        found = self.captured[kind]
        for own, new in zip(found.inputs, tensors, strict=True):
            own.copy_(new)
        found.graph.replay()
        for parameter, gradient in zip(self.parameters, found.gradients, strict=True):
            parameter.grad = gradient
        return found.outputs

    def _run(
        self, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], fixed: dict[str, Hashable]
    ) -> Sequence[Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        outputs = function(*tensors, **fixed)
        outputs[0].backward()
        return [output.detach() for output in outputs]

    def _capture(
        self, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], fixed: dict[str, Hashable]
    ) -> Captured:
        inputs = [tensor.clone() for tensor in tensors]
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                self._run(function, inputs, fixed)
        here.wait_stream(aside)
        for parameter in self.parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._run(function, inputs, fixed)
        if any(table.cache_info().currsize == table.cache_info().maxsize for table in TABLES):
            raise RuntimeError("a captured pass may lose a table that it reads: train with fewer kinds of passes")
        return Captured(graph, inputs, outputs, [parameter.grad for parameter in self.parameters])
