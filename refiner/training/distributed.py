"""One training in several processes, as torchrun starts them: FSDP2's shards, checkpoints that each
writes a part of.

Each process makes its own rows of every step's clips. With one process nothing here does anything.
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

OLDEST = (2, 9)  # of torch
PATIENCE = timedelta(hours=2)  # of the other processes, while the first draws a sample sheet


@contextmanager
def distributed(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for the time of a training; yields this one's
    device.

    Where they are joined already they stay so: gloo does not join twice in one process.
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
        dist.barrier()  # the others wait for what the first one writes
    finally:
        dist.destroy_process_group()


def is_one_of_several() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def end_process(status: int) -> NoReturn:
    """End one of several processes with this exit status, without taking the interpreter down.

    Gloo's threads outlive their group (seen with torch 2.13), and one that asks for the
    interpreter's lock while it is taken down aborts the process: "terminate called without an
    active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def check_torch(version: str) -> None:
    """Raise ValueError for a torch whose sharded trainings differ from those of one process, as the
    critic's of 2.7."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise ValueError(
            f"training in several processes needs torch 2.9 or newer, and torch is {version}"
        )


def world() -> int:
    """Processes of this training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This one's number."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that logs and draws."""
    return rank() == 0


def averaged(figures: Tensor) -> Tensor:
    """The mean over all processes."""
    if world() > 1:
        dist.all_reduce(figures)
        figures /= world()
    return figures


def whole(tensor: Tensor) -> Tensor:
    """A parameter in one piece; where it is sharded every process must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(network: CausalWan) -> CausalWan:
    """The network with every parameter split among the processes, and gathered while its module
    runs."""
    if world() == 1:
        return network
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view"
    )  # nothing here writes in place
    model = shared_copy(network.model)
    mesh = init_device_mesh(next(model.parameters()).device.type, (world(),))
    units = [*model.blocks, model.head]
    for unit in units:
        unit.forward = MethodType(_forward, unit)
    for part in (
        *units,
        model.patch_embedding,
        model.text_embedding,
        model.time_embedding,
        model.time_projection,
    ):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return replace(network, model=model, apply=gathered)


def _forward(module: nn.Module, function: Callable, *arguments: object) -> object:
    return function(module, *arguments)


def gathered(function: Callable, module: nn.Module, *arguments: object) -> object:
    """A function of a sharded module, run as its forward: FSDP gathers the parameters before it and
    lets go after."""
    return module(function, *arguments)


def save_shards(state: dict, run: Path, done: int) -> None:
    """Write the state after `done` steps into the run's folder, each process its shards; the state
    before stays until the new one is complete."""
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
    """Saved states, the newest last."""
    return sorted(run.glob("state_[0-9]*"))


def load_shards(state: dict, run: Path) -> int:
    """Read the newest state into `state`, whose tensors are all there; returns its number of steps.
    ValueError where it is damaged, or of other tensors."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    folder = saved_shards(run)[-1]
    try:
        checkpoint.load(state, checkpoint_id=folder)
    except CheckpointException as error:  # of every process; not an Exception
        reasons = [
            str(one[0] if isinstance(one, tuple) else one) for one in error.failures.values()
        ]
        raise ValueError(
            f"{folder.name} cannot be read: {(reasons or ['no reason is told'])[0]}"
        ) from error
    return int(folder.name.removeprefix("state_"))
