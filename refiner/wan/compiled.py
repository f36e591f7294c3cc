"""Norms, gates, RoPE and activations of a pass, fused by torch.compile; products stay as they are.

Shapes are static: each length of chunk is compiled by itself, once, and kept on disk by torch.
"""

import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .causal import (
    CausalWan,
    Halves,
    Kernels,
    KeyValue,
    Modulation,
    after_text,
    before_attention,
    before_text,
)

KINDS_OF_CALL = 64  # compilations per function: lengths of chunks, with and without gradients


def allow_recompiling(times: int) -> None:
    """Let a function be recompiled so often, and when hooks come, as a refiner's branches are.

    By default torch goes on without the hooks. It renamed the limit in 2.6.
    """
    config = torch._dynamo.config
    if hasattr(config, "skip_nnmodule_hook_guards"):
        config.skip_nnmodule_hook_guards = False
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, max(times, getattr(config, name)))
            return


@dataclass(slots=True)
class Compiler:
    """Compiles functions, and counts the seconds that it takes.

    Where compiling fails, as without a C++ compiler, a warning says so once, and functions run as
    they are.
    """

    backend: str = "inductor"
    seconds: float = 0.0
    failure: str = ""  # why nothing is compiled any more
    functions: dict[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function compiled for every shape that it is called with."""
        if function not in self.functions:
            self.functions[function] = self._compiled(function)
        return self.functions[function]

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        allow_recompiling(KINDS_OF_CALL)
        compiled = torch.compile(function, dynamic=False, backend=self.backend)
        known: set[Hashable] = set()

        def run(*arguments: object) -> object:
            if self.failure:
                return function(*arguments)
            kind = tuple((each.shape, each.dtype) for each in tensors_of(arguments))
            began = time.perf_counter()
            try:
                result = compiled(*arguments)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                result = function(*arguments)  # raises an error of its own again
                self.failure = f"runs uncompiled, which is slower: {reason_of(error)}"
                warnings.warn(self.failure, stacklevel=2)
                return result
            if kind not in known:
                self.seconds += time.perf_counter() - began
                known.add(kind)
            return result

        return run


def reason_of(error: RuntimeError) -> str:
    """Return the line of an error that gives its reason: after "backend raised:" and the like."""
    lines = [line.strip() for line in str(error).split("\n")]
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)


def tensors_of(values: object) -> Iterator[Tensor]:
    """Yield the tensors among values, and in tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_of(value)


def rotate_pairs(x_BNHD: Tensor, parts: Tensor) -> Tensor:
    """Return `rotate` of x by a table's real and imaginary parts [N, D/2, 2]."""
    even, odd = x_BNHD.to(parts.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    real, imaginary = parts[:, None].unbind(-1)
    turned = (even * real - odd * imaginary, even * imaginary + odd * real)
    return torch.stack(turned, dim=-1).flatten(-2).to(x_BNHD.dtype)


def compiled_network(network: CausalWan, compiler: Compiler) -> CausalWan:
    """Return the network with compiled parts; attention stays as it is."""
    turn, before = compiler(rotate_pairs), compiler(before_attention)
    to_text, from_text = compiler(before_text), compiler(after_text)

    def rotate(x_BNHD: Tensor, table: Tensor) -> Tensor:
        return turn(x_BNHD, torch.view_as_real(table))

    def after(
        block: nn.Module,
        x_BNM: Tensor,
        attended_BNM: Tensor,
        gate: Tensor,
        ffn_mod: Modulation,
        text: KeyValue,
        heads: int,
        kernels: Kernels,
    ) -> Tensor:
        x, query = to_text(block, x_BNM, attended_BNM, gate, heads)
        return from_text(block, x, kernels.attention(query, text.key, text.value), ffn_mod)

    kernels = replace(network.kernels, rotate=rotate)
    return replace(network, kernels=kernels, halves=Halves(before, after))
