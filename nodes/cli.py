"""The command line of the installed package: the core's commands, and `run` for workflows."""

import argparse
import os
import sys
from pathlib import Path

RUN = """\
Execute a ComfyUI workflow, saved with Export (API), without ComfyUI.

  autorefiner run workflows/api/quickstart.json --set 3.seed=7 --out videos

It may use this pack's nodes and CLIPTextEncode, CLIPLoader, VAELoader, LoadImage, ImageScale,
ImageStitch, VAEEncode, VAEDecode, CreateVideo, SaveVideo, SaveAnimatedWEBP and SaveImage. Models
are looked up where ComfyUI has them: BASE/models/vae/ …"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; bad input is one line on stderr and exit status 2."""
    from ..refiner import cli

    return cli.main(argv, {"run": (add_run, run)})


def add_run(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand `run`."""
    command = commands.add_parser(
        "run",
        help="workflow to video",
        description=RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("workflow", type=Path, metavar="FILE.json")
    about = "set an input of a node, given by id or title; may be repeated"
    command.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help=about
    )
    about = "where to write files (default BASE/output)"
    command.add_argument("--out", type=Path, metavar="FOLDER", help=about)
    about = "the folder with models/ and input/ (default: COMFYUI_PATH, else this folder)"
    base = Path(os.environ.get("COMFYUI_PATH", "."))
    command.add_argument("--base", type=Path, default=base, metavar="FOLDER", help=about)
    about = "cpu, cuda, cuda:1, mps (default: a GPU if there is one)"
    command.add_argument("--device", default="auto", help=about)


def run(args: argparse.Namespace) -> int:
    """Execute a workflow and name the files that it wrote."""
    from ..refiner.terminal import say
    from .hosts import standalone
    from .workflow import execute, prompt_of, read_workflow, with_values, written

    nodes = with_values(read_workflow(args.workflow), args.set)
    with standalone.running_at(
        standalone.place_of(args.base, args.out, args.device, prompt_of(nodes))
    ):
        results = execute(nodes)
    for path in written(results):
        say(str(path))
    return 0


if __name__ == "__main__":
    from ..__main__ import main as start

    sys.exit(start())
