"""Training in several processes (torchrun): FSDP2 and sharded checkpoints.

Each process samples its rows of every step's clips. With one process everything here is a no-op.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..noise.refiner import shared_copy
from ..wan.causal import CausalWan

OLDEST = (2, 9)  # torch version
PATIENCE = timedelta(hours=2)  # the others wait while the first process draws a sample sheet


@contextmanager
def distributed(device: torch.device) -> Iterator[torch.device]:
    """Join torchrun's process group for a training; yields this process's device.

    An existing group is reused: gloo cannot join twice in one process.
    """
    if not is_one_of_several():
        yield device
        return
    check_torch(torch.__version__)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world() > 1:
        yield device
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE
    )
    try:
        yield device
        dist.barrier()  # until the first process has written its files
    finally:
        dist.destroy_process_group()


def is_one_of_several() -> bool:
    """Return whether torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def end_process(status: int) -> NoReturn:
    """Exit one of several processes without shutting the interpreter down.

    Gloo's threads outlive their group (seen with torch 2.13), and one that takes the GIL during
    shutdown aborts the process: "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def check_torch(version: str) -> None:
    """Raise ValueError for a torch too old for sharded training: 2.7 trains a different critic."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise ValueError(
            f"training in several processes needs torch 2.9 or newer, and torch is {version}"
        )


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Return whether this is the process that logs and draws."""
    return rank() == 0


def averaged(figures: Tensor) -> Tensor:
    """Average over all processes, in place."""
    if world() > 1:
        dist.all_reduce(figures)
        figures /= world()
    return figures


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded parameter; every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(network: CausalWan) -> CausalWan:
    """Shard every parameter over the processes; FSDP gathers it while its module runs."""
    if world() == 1:
        return network
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # harmless: nothing here writes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    model = shared_copy(network.model)
    mesh = init_device_mesh(next(model.parameters()).device.type, (world(),))
    units = [*model.blocks, model.head]
    for unit in units:
        unit.forward = MethodType(_forward, unit)
    embeddings = [model.patch_embedding, model.text_embedding, model.time_embedding]
    for module in (*units, *embeddings, model.time_projection):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return replace(network, model=model, apply=gathered)


def _forward(module: nn.Module, function: Callable, *arguments: object) -> object:
    return function(module, *arguments)


def gathered(function: Callable, module: nn.Module, *arguments: object) -> object:
    """Call a function of a sharded module as its forward, so that FSDP gathers its parameters."""
    return module(function, *arguments)


def save_shards(state: dict, run: Path, done: int) -> None:
    """Save the state after `done` steps, each process its shards, then drop the previous state."""
    import torch.distributed.checkpoint as checkpoint

    folder, partial = run / f"state_{done:08d}", run / ".state.partial"
    if is_first():
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    checkpoint.save(state, checkpoint_id=partial)
    dist.barrier()
    if is_first():
        before = saved_shards(run)
        if folder in before:
            shutil.rmtree(folder)
        os.replace(partial, folder)
        for old in before:
            if old != folder:
                shutil.rmtree(old)
    dist.barrier()


def saved_shards(run: Path) -> list[Path]:
    """Return the saved states, newest last."""
    return sorted(run.glob("state_[0-9]*"))


def load_shards(state: dict, run: Path) -> int:
    """Load the newest state into the tensors of `state`; returns its number of steps.

    ValueError if it is damaged or holds other tensors.
    """
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    folder = saved_shards(run)[-1]
    try:
        checkpoint.load(state, checkpoint_id=folder)
    except CheckpointException as error:  # collects all processes' errors; not an Exception
        failures = error.failures.values()
        reasons = [str(one[0] if isinstance(one, tuple) else one) for one in failures]
        reason = reasons[0] if reasons else "no reason given"
        raise ValueError(f"{folder.name} cannot be read: {reason}") from error
    return int(folder.name.removeprefix("state_"))
