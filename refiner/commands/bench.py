"""`autorefiner bench`: measure this machine."""

import argparse
import dataclasses
import json
from pathlib import Path

from ..acceleration import Acceleration
from ..bench import SIZES, bench
from ..bench_refiner import bench_refiner
from ..device import pick_device, pick_dtype
from ..files import check_output
from ..memory.policies import POLICIES
from ..memory.stores import STORES
from ..terminal import say
from .arguments import add_acceleration, add_machine


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand `bench`."""
    about = "Sample with random weights of a size and print speed and memory."
    command = commands.add_parser("bench", help="measure this machine", description=about)
    command.add_argument("--size", choices=SIZES, default="tiny")
    about = "chunks of 3 latent frames; 7 are 81 frames"
    command.add_argument("--chunks", type=int, default=7, help=about)
    about = "latent frames held in memory; -1 is all (default: the memory's own, or all)"
    command.add_argument("--window", type=int, metavar="FRAMES", help=about)
    about = f"which frames a chunk attends to: {', '.join(POLICIES)}; with knobs"
    command.add_argument("--memory", default="window", metavar="NAME[:KNOB=VALUE,…]", help=about)
    about = "how keys and values lie in memory"
    command.add_argument("--store", choices=STORES, default="plain", help=about)
    about = "measure what a refiner costs in all its forms, instead"
    command.add_argument("--refiner", action="store_true", help=about)
    about = "write the figures as JSON, too"
    command.add_argument("--json", type=Path, metavar="FILE", help=about)
    add_machine(command)
    add_acceleration(command)


def run_bench(args: argparse.Namespace) -> int:
    """Measure, print the table and write the JSON file."""
    device = pick_device(args.device)
    if args.json:
        check_output(args.json)
    measure = bench_refiner if args.refiner else bench
    dtype = pick_dtype(args.dtype, device)
    acceleration = Acceleration(args.compile, args.graphs)
    memory = args.window, args.store, args.memory
    report = measure(args.size, device, dtype, args.chunks, *memory, acceleration)
    say(*report.table().split("\n"))
    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return 0
