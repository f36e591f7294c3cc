"""Faster sampling: compiled parts of a pass, and CUDA graphs of passes that repeat."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from .memory.plan import MemoryPlan
from .noise.refiner import Refiner
from .wan.causal import CausalWan
from .wan.compiled import Compiler, compiled_network
from .wan.graphs import Replays, shared_pool

Graphs = Literal["off", "auto"]
GRAPHS = get_args(Graphs)


@dataclass(frozen=True, slots=True)
class Acceleration:
    """Options that make a run faster; the defaults change nothing.

    `compile` fuses norms, gates, RoPE and activations, which changes results by rounding. `graphs`
    of `auto` replays on a GPU the passes that repeat from chunk to chunk.
    """

    compile: bool = False
    graphs: Graphs = "off"
    compiler: Compiler = field(default_factory=Compiler, compare=False)

    def __post_init__(self) -> None:
        if self.graphs not in GRAPHS:
            raise ValueError(f"graphs {self.graphs!r}: use {' or '.join(GRAPHS)}")

    def notes(self, memory: MemoryPlan, device: torch.device) -> list[str]:
        """List what does nothing in a run with this memory, one line each."""
        if self.graphs == "off":
            return []
        if device.type != "cuda":
            return [f"graphs do nothing on {device.type}: they need a CUDA device"]
        if not memory.policy.static:
            return [f"graphs do nothing with memory {memory.policy.name}: its reads vary"]
        if not memory.store.static:
            return ["graphs do nothing with store offload: its copies vary"]
        return []

    def replays(self, device: torch.device) -> bool:
        """Whether passes on a device may be replayed."""
        return self.graphs == "auto" and device.type == "cuda"

    def passes_held(self, memories: Iterable[MemoryPlan], device: torch.device) -> int:
        """Count the passes whose activations are held: graphs have memory of their own."""
        return 2 if self.replays(device) and any(each.static for each in memories) else 1

    @contextmanager
    def attached(
        self, network: CausalWan, refiner: Refiner | None, device: torch.device
    ) -> Iterator[tuple[CausalWan, Refiner | None]]:
        """Return the network and refiner of one run, whose memory is freed inside."""
        networks = [network, refiner.network] if refiner else [network]
        if self.compile:
            networks = [compiled_network(each, self.compiler) for each in networks]
        replays = []
        if self.replays(device):
            pool = shared_pool(device)
            replays = [Replays(each, pool) for each in networks]
            pairs = zip(networks, replays, strict=True)
            networks = [replace(each, execute=execute) for each, execute in pairs]
        try:
            yield networks[0], refiner and replace(refiner, network=networks[1])
        finally:
            for each in replays:
                each.free()
