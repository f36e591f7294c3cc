"""Notices of an accelerated run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..refiner.acceleration import Acceleration
from ..refiner.memory.plan import MemoryPlan


@contextmanager
def noting(
    acceleration: Acceleration,
    memory: MemoryPlan,
    device: torch.device,
    notice: Callable[[str], None],
) -> Iterator[Acceleration]:
    """Return the acceleration; say what of it does nothing, afterwards what compiling took."""
    for line in acceleration.notes(memory, device):
        notice(line)
    compiler = acceleration.compiler
    before = compiler.seconds
    yield acceleration
    if compiler.failure:  # maybe of an earlier run
        notice(compiler.failure)
    elif compiler.seconds > before:
        notice(f"{compiler.seconds - before:.1f} s of this run were compiling")
