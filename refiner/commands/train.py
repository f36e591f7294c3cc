"""`autorefiner train` and `autorefiner demo`: the commands that train."""

import argparse
from pathlib import Path

from ..demo.cli import run_demo
from ..device import pick_device
from ..terminal import say
from ..train import run_probe, run_training, train_on_demo
from ..training.distributed import distributed, is_first

TRAIN = """\
Train a noise refiner from a TOML file. A run that was killed or stopped goes on with the same
command. For example, a refiner of the demo, trained with its reward model:

  out = "sprites.refiner.safetensors"
  [refiner]
  objective = "reward"
  [[rewards]]
  kind = "sprites"

Before a long training, --probe says whether its gradient has a signal.

In several processes, which share the batch and hold a part of each network:

  torchrun --nproc-per-node 8 --no-python autorefiner train refiner.toml"""


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand `train`."""
    command = commands.add_parser(
        "train",
        help="train a refiner",
        description=TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("config", type=Path, metavar="CONFIG.toml")
    about = (
        "do not train: say whether the gradient has a signal, after the critic's warm-up, which"
        " is saved"
    )
    command.add_argument("--probe", action="store_true", help=about)
    about = "independent batches that --probe compares (default %(default)s)"
    command.add_argument("--batches", type=int, default=8, metavar="N", help=about)
    about = "cpu or cuda (default: a GPU if there is one)"
    command.add_argument("--device", default="auto", help=about)


def run_train(args: argparse.Namespace) -> int:
    """Train or probe, and print the result in the first process."""
    with distributed(pick_device(args.device)) as device:
        if args.probe:
            lines = run_probe(args.config, device, args.batches).lines()
        else:
            lines = [str(run_training(args.config, device))]
        if is_first():
            say(*lines)
    return 0


def run_demo_command(args: argparse.Namespace) -> int:
    """Run an action of `autorefiner demo` on the device that is asked for."""
    return run_demo(args, pick_device(args.device), train_on_demo)
