"""The command line: autorefiner generate | inspect | presets | calibrate | bench | train | demo."""

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from .commands.arguments import ERROR, Parser
from .commands.bench import add_bench, run_bench
from .commands.calibrate import add_calibrate, run_calibrate
from .commands.generate import add_generate, run_generate
from .commands.inspect import add_inspect, run_inspect
from .commands.train import add_train, run_demo_command, run_train
from .demo.cli import add_demo
from .preset_table import preset_table
from .stopping import INTERRUPTED, handling, interrupt
from .terminal import say, warn

AddCommand = Callable[[argparse._SubParsersAction], None]
RunCommand = Callable[[argparse.Namespace], int]
SMALLER = {  # advice when a command runs out of memory
    "generate": "lower --size or --window, or use --dtype bf16",
    "inspect": "close what else uses the memory",
    "presets": "close what else uses the memory",
    "calibrate": "take a smaller --size or fewer --frames",
    "bench": "take a smaller --size",
    "train": "lower the batch and raise accumulation, or set checkpointing = true",
    "demo": "lower the --batch of a training, or use --device cpu",
    "run": "make the clip smaller or shorter, or connect a Reflective Cache with a smaller window",
}


def add_presets(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand `presets`."""
    about = "Print the table of presets."
    commands.add_parser("presets", help="list how models are sampled", description=about)


def run_presets(_: argparse.Namespace) -> int:
    """Print the table of presets."""
    say(*preset_table().split("\n"))
    return 0


COMMANDS: dict[str, tuple[AddCommand, RunCommand]] = {
    "generate": (add_generate, run_generate),
    "inspect": (add_inspect, run_inspect),
    "presets": (add_presets, run_presets),
    "calibrate": (add_calibrate, run_calibrate),
    "bench": (add_bench, run_bench),
    "train": (add_train, run_train),
    "demo": (add_demo, run_demo_command),
}


def build_parser(more: Sequence[AddCommand] = ()) -> argparse.ArgumentParser:
    """Build the parser of every subcommand; `more` adds further ones."""
    parser = Parser(prog="autorefiner", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (*(add for add, _ in COMMANDS.values()), *more):
        add(commands)
    return parser


def main(
    argv: list[str] | None = None,
    more: Mapping[str, tuple[AddCommand, RunCommand]] = MappingProxyType({}),
) -> int:
    """Run the command line; wrong input is one line on stderr and exit status 2.

    `more` maps names of further subcommands to the functions that add them and run them.
    """
    warnings.showwarning = lambda message, *_, **__: warn(
        f"autorefiner: warning: {' '.join(str(message).split())}"
    )
    try:
        with handling(interrupt):
            return run_command(argv, more)
    except KeyboardInterrupt:
        warn("stopped")
        return INTERRUPTED


def run_command(argv: list[str] | None, more: Mapping[str, tuple[AddCommand, RunCommand]]) -> int:
    """Run one command and return the exit status."""
    args = build_parser([add for add, _ in more.values()]).parse_args(argv)
    _, run = {**COMMANDS, **more}[args.command]
    try:
        return run(args)
    except (ValueError, OSError) as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "Python's own objects").splitlines()[0]
        message = f"out of memory ({reason}): {SMALLER[args.command]}"
    warn(f"{ERROR}{' '.join(message.split())}")
    return 2


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch raises a plain RuntimeError for it on a CPU."""
    is_raised_for_it = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_raised_for_it or "allocate memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
