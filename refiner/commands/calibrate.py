"""`autorefiner calibrate`: list the heads of a model that look at near frames alone."""

import argparse
from pathlib import Path

from ..calibrate import calibrate, prepare_calibration
from ..files import check_output
from ..schedule import PRESETS
from ..terminal import say, warn
from .arguments import add_machine, size
from .generate import add_model, options_of

CALIBRATE = """\
Sample clips with full history, measure how much of its attention each head gives to the last
frames, and write the list of heads that --memory head-windows reads (Forcing-KV).

  autorefiner calibrate --model sprites --prompt "a red star circles on a navy ground" \\
      --out heads.json
  autorefiner generate --model sprites --prompt "a red star circles on a navy ground" \\
      --memory head-windows:heads=heads.json --out star.mp4"""


def add_calibrate(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand `calibrate`."""
    command = commands.add_parser(
        "calibrate",
        help="list heads for --memory head-windows",
        description=CALIBRATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(command.add_argument_group("model"))
    about = "may be repeated: the list then holds for all of them"
    command.add_argument(
        "--prompt", action="append", required=True, dest="prompts", metavar="TEXT", help=about
    )
    about = "default: what the file's name or metadata proves; `autorefiner presets` lists them"
    command.add_argument("--preset", choices=PRESETS, metavar="NAME", help=about)
    about = "pixel frames of each clip, 1 + 4n (default 81); all of them are held in memory"
    command.add_argument("--frames", type=int, default=81, help=about)
    about = "multiples of 16 (default: that of the model)"
    command.add_argument("--size", type=size, metavar="WxH", help=about)
    command.add_argument("--seed", type=int, default=0)
    about = "share of its attention that makes a head static (default 0.8)"
    command.add_argument("--threshold", type=float, default=0.8, metavar="SHARE", help=about)
    command.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    about = "replace a list that is there already"
    command.add_argument("--overwrite", action="store_true", help=about)
    add_machine(command)


def run_calibrate(args: argparse.Namespace) -> int:
    """Measure, print the table and write the list."""
    check_output(args.out)
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"output {args.out} exists: give another name, or --overwrite")
    clip = {"out": args.out.with_suffix(".mp4"), "prompt": args.prompts[0]}  # never written
    options = options_of(argparse.Namespace(**{**vars(args), **clip}))
    job = prepare_calibration(options, args.threshold)
    for number, calibration in enumerate(calibrate(job, args.prompts, args.threshold), 1):
        static = sum(map(len, calibration.heads.static))
        warn(f"{number} of {len(args.prompts)} clips measured: {static} static heads")
    say(*calibration.table().split("\n"))
    source = {name: job.metadata[name] for name in ("model", "preset", "levels", "size", "seed")}
    calibration.write(args.out, {**source, "frames": job.options.frames, "prompts": args.prompts})
    return 0
