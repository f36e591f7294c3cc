"""`autorefiner inspect`: say what a file is."""

import argparse
from pathlib import Path

from ..latents import inspect_latents, is_latents
from ..reading import check_regular
from ..terminal import say
from ..video import count_frames, read_metadata
from ..wan.checkpoint import describe, inspect


def add_inspect(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand `inspect`."""
    about = (
        "Say what a model, LoRA, VAE, video or latents file is, from its names, shapes and"
        " metadata."
    )
    command = commands.add_parser("inspect", help="say what a file is", description=about)
    command.add_argument("file", type=Path)


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a file holds, a property a line."""
    path: Path = args.file
    if not path.is_dir():
        check_regular(path)
    if path.suffix.lower() == ".mp4":
        rows = video_rows(path)
    elif is_latents(path):
        rows = latents_rows(path)
    else:
        say(*describe(inspect(path)).split("\n"))
        return 0
    timeline = rows.pop("timeline", "")
    say(*(f"{name:<9} {' '.join(value.split())}" for name, value in rows.items()))
    if timeline:
        say("timeline", *(f"  {' '.join(line.split())}" for line in timeline.splitlines()))
    return 0


def video_rows(path: Path) -> dict[str, str]:
    """Properties of a video."""
    return {"kind": "video", "made": f"{count_frames(path)} frames"} | read_metadata(path)


def latents_rows(path: Path) -> dict[str, str]:
    """Properties of a latents file."""
    info = inspect_latents(path)
    length = f"{info.frames} latent frames, {max(0, 4 * info.frames - 3)} pixel"
    if info.cut:
        length += ", then a part of a chunk"
    return {"kind": "latents", "made": length} | info.metadata
