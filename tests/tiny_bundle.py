"""Tiny random models in place of the demo's, for training in one process or several."""

import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from unittest.mock import patch

import torch

from autorefiner.refiner import bundles
from autorefiner.refiner import train as training
from autorefiner.refiner.cli import main
from autorefiner.refiner.demo import sheets
from autorefiner.refiner.demo.bundle import save_model
from autorefiner.refiner.demo.clips import student_clips
from autorefiner.refiner.demo.reward_model import SpriteVideoText
from autorefiner.refiner.demo.text_encoder import SpriteTextEncoder
from autorefiner.refiner.training.distributed import distributed, end_process
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer
from autorefiner.refiner.wan.vae import WanVAE

SIZES = WanConfig(dim=32, num_heads=2, ffn_dim=32, num_layers=2, text_dim=16, text_len=32)


def write_tiny_bundle(models: Path) -> None:
    """Write a bundle's files, all but the refiner's."""
    torch.manual_seed(0)
    save_model(models, "vae", WanVAE(4), None, {})
    save_model(models, "text", SpriteTextEncoder(16), None, {})
    for name, recipe in (("teacher", {}), ("student", {"preset": "self-forcing"})):
        save_model(models, name, WanTransformer(SIZES), SIZES, recipe)
    save_model(models, "reward", SpriteVideoText(16, 16), None, {})


def use_bundle(models: Path, put: Callable[[object, str, object], None] = setattr) -> None:
    """Have trainings load their models from `models`; `put` sets an attribute of a module."""
    put(bundles, "BUNDLES", {**bundles.BUNDLES, bundles.DEMO: bundles.sprites(models)})
    put(training, "BUNDLED_PROMPTS", 8)
    put(training, "HELD_OUT", 2)
    put(sheets, "student_clips", partial(student_clips, frames=6))


def start_forkserver() -> BaseContext:
    """Start the fork server if there is none, with the slow imports preloaded."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    process = context.Process(target=os.getpid)
    # The server's only path to the test helpers.
    with patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
        process.start()
    process.join()
    return context


def train_in_processes(
    models: Path, configs: Sequence[Path], count: int, folder: Path
) -> list[int]:
    """Run each file's training in `count` processes, one after the other; return exit statuses.

    The processes are set up as torchrun does, but forked after the imports. Their output is in the
    folder: `out_0`, `err_0` and so on.
    """
    context = start_forkserver()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": str(count),
        }
    processes = [
        context.Process(target=_train, args=(models, configs, folder, environment, i))
        for i in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _train(
    models: Path, configs: Sequence[Path], folder: Path, environment: dict[str, str], rank: int
) -> None:
    """Train as one of several processes, then exit."""
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    use_bundle(models)
    with distributed(torch.device("cpu")):
        status = max(main(["train", str(path), "--device", "cpu"]) for path in configs)
    end_process(status)
