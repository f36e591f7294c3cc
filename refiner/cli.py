"""The command line: autorefiner generate | inspect | presets | bench | train | demo."""

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import torch
from tqdm import tqdm

from .bench import SIZES, bench
from .bench_refiner import bench_refiner
from .bundles import BUNDLES, PUBLISHED_SIZE, bundled_refiners, find_bundle
from .demo.cli import add_demo, run_demo
from .device import DTYPES, pick_device, pick_dtype
from .files import check_output, partial_path
from .generate import generate
from .job import Job, notes, prepare
from .latents import inspect_latents, is_latents
from .memory.policies import POLICIES
from .preset_table import preset_table
from .reading import check_regular
from .refiner_plan import FORMS
from .request import GenerateOptions
from .rollout import Progress
from .samplers import SAMPLERS
from .schedule import PRESETS, STEPS
from .stopping import INTERRUPTED, handling, interrupt, settle
from .terminal import say, warn
from .train import run_probe, run_training, train_on_demo
from .training.distributed import distributed, is_first
from .video import count_frames, read_metadata
from .wan.checkpoint import describe, inspect
from .wan.lora import LoraFile

ERROR = "autorefiner: error: "
AddCommand = Callable[[argparse._SubParsersAction], None]
RunCommand = Callable[[argparse.Namespace], int]
CLOCK = 1.0  # seconds that a file system's clock may lag
SMALLER = {  # what takes less memory, by command
    "generate": "lower --size or --window, or use --dtype bf16",
    "inspect": "close what else uses the memory",
    "presets": "close what else uses the memory",
    "bench": "take a smaller --size",
    "train": "lower the batch and raise accumulation, or set checkpointing = true",
    "demo": "lower the --batch of a training, or use --device cpu",
    "run": "make the clip smaller or shorter, or connect a Reflective Cache with a smaller window",
}
GENERATE = """\
Sample a video chunk by chunk and write each chunk to the file as soon as it is made.

  autorefiner generate --model sprites --prompt "a red star circles on a navy ground" --out star.mp4
  autorefiner generate --model self_forcing_dmd.pt --text-encoder umt5-xxl/ --vae Wan2.1_VAE.pth \\
      --prompt "a red fox in the snow" --frames 81 --size 832x480 --out fox.mp4

Stopped with Ctrl-C (or killed), it leaves fox.partial.mp4 with every finished chunk. With --save-latents the run can go
on: the same command with --extend fox.latents.partial.safetensors gives the video that was not interrupted."""

TRAIN = """\
Train a noise refiner as a TOML file says; killed or stopped, the same command goes on. For one of the demo, by reward:

  out = "sprites.refiner.safetensors"
  [refiner]
  objective = "reward"
  [[rewards]]
  kind = "sprites"

Before a long training, --probe says whether its gradient has a signal.

In several processes, which share the batch and hold a part of each network:

  torchrun --nproc-per-node 8 --no-python autorefiner train refiner.toml"""


class Parser(argparse.ArgumentParser):
    """Report wrong arguments in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        warn(f"{ERROR}{message}; see {self.prog} --help")
        self.exit(2)


def falling_levels(text: str) -> tuple[int, ...]:
    """Nominal levels, from pure noise down."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers) or int(numbers[0]) != STEPS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give levels that fall from {STEPS}, like 1000,750,500,250"
        )
    return tuple(int(number) for number in numbers)


def levels(text: str) -> tuple[int, ...]:
    """Nominal levels in any order."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: give nominal levels, like 750,500")
    return tuple(int(number) for number in numbers)


def refiner_form(text: str) -> str:
    """The form of a refiner; `branches` is the older name of `unmerged`."""
    form = {"branches": "unmerged"}.get(text, text)
    if form not in FORMS:
        raise argparse.ArgumentTypeError(f"{text!r}: give auto, merged or unmerged")
    return form


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: give WIDTHxHEIGHT in pixels, like 832x480")
    return int(sides[0]), int(sides[1])


def lora(text: str) -> LoraFile:
    """Parse FILE or FILE:STRENGTH."""
    try:
        return LoraFile.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser(more: Sequence[AddCommand] = ()) -> argparse.ArgumentParser:
    """Build the parser of every subcommand; `more` adds those of other rooms."""
    parser = Parser(prog="autorefiner", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_generate(commands)
    about = "Say what a model, LoRA, VAE, video or latents file is, from its names, shapes and metadata."
    command = commands.add_parser("inspect", help="say what a file is", description=about)
    command.add_argument("file", type=Path)
    commands.add_parser(
        "presets", help="list how models are sampled", description="Print the table of presets."
    )
    about = "Sample with random weights of a size and print speed and memory."
    command = commands.add_parser("bench", help="measure this machine", description=about)
    command.add_argument("--size", choices=SIZES, default="tiny")
    command.add_argument(
        "--chunks", type=int, default=7, help="chunks of 3 latent frames; 7 are 81 frames"
    )
    command.add_argument(
        "--window", type=int, default=-1, help="latent frames held in memory; -1 is all"
    )
    command.add_argument(
        "--refiner", action="store_true", help="what a refiner costs, in all its forms, instead"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON, too")
    add_machine(command)
    command = commands.add_parser(
        "train",
        help="train a refiner",
        description=TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("config", type=Path, metavar="CONFIG.toml")
    about = "do not train: say whether the gradient has a signal, after the critic's warm-up, which is saved"
    command.add_argument("--probe", action="store_true", help=about)
    about = "independent batches that --probe compares (default %(default)s)"
    command.add_argument("--batches", type=int, default=8, metavar="N", help=about)
    command.add_argument(
        "--device", default="auto", help="cpu or cuda (default: a GPU if there is one)"
    )
    add_demo(commands)
    for add in more:
        add(commands)
    return parser


def add_generate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "generate",
        help="prompt to video",
        description=GENERATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = command.add_argument_group("model")
    names = " or ".join(BUNDLES)
    about = f"a checkpoint as published (.pt, .safetensors), or a bundled one: {names}"
    model.add_argument("--model", required=True, metavar="FILE|NAME", help=about)
    about = "where a file holds both: averaged (ema) or last (raw); default: what its authors sample with"
    model.add_argument("--weights", choices=("auto", "ema", "raw"), default="auto", help=about)
    about = "a LoRA to merge on load, strength 1 unless said; may be repeated (LongLive 1 needs its own)"
    model.add_argument("--lora", type=lora, action="append", metavar="FILE[:STRENGTH]", help=about)
    model.add_argument("--vae", type=Path, metavar="FILE", help="Wan2.1's VAE")
    model.add_argument(
        "--text-encoder", type=Path, metavar="PATH", help="umT5-xxl, a folder or a file"
    )
    model.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="its tokenizer, if it does not lie beside it"
    )
    model.add_argument(
        "--context-cache", type=Path, metavar="FOLDER", help="keep encoded prompts here"
    )
    model.add_argument(
        "--context", type=Path, metavar="FILE", help="an encoded prompt instead of a text encoder"
    )

    what = command.add_argument_group("video")
    what.add_argument("--prompt", default="", help="what to show, as the model's authors prompt it")
    what.add_argument(
        "--frames",
        type=int,
        default=81,
        help="pixel frames of the whole video, 1 + 4n (default 81)",
    )
    about = f"multiples of 16 (default {default_sizes()})"
    what.add_argument("--size", type=size, metavar="WxH", help=about)
    what.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same noise on any device"
    )
    what.add_argument(
        "--extend", type=Path, metavar="FILE", help="latents of an earlier run to go on from"
    )
    what.add_argument("--out", type=Path, required=True, metavar="FILE.mp4")
    what.add_argument(
        "--overwrite", action="store_true", help="replace a video that is there already"
    )
    what.add_argument(
        "--save-latents",
        action="store_true",
        help="write latents beside the video, to go on from later",
    )
    what.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a contact sheet, too")

    about = "A preset says how a model was trained to be sampled; the rest overrides it."
    how = command.add_argument_group("sampling", about)
    about = "default: what the file's name or metadata proves; `autorefiner presets` lists them"
    how.add_argument("--preset", choices=PRESETS, metavar="NAME", help=about)
    how.add_argument(
        "--levels",
        "--steps",
        type=falling_levels,
        metavar="N,N,…",
        help="nominal, falling from 1000",
    )
    about = "latent frames held in memory (sink + past + current chunk), -1 all; with one, memory is flat in length"
    how.add_argument("--window", type=int, metavar="FRAMES", help=about)
    how.add_argument(
        "--sink",
        type=int,
        metavar="FRAMES",
        help="of the window, first frames of the video that stay",
    )
    how.add_argument(
        "--method", default="self-forcing", metavar="NAME[:KNOB=VALUE,…]",
        help=f"{', '.join(SAMPLERS)}; with knobs like self-refine:threshold=0.2",
    )  # fmt: skip
    how.add_argument(
        "--policy", default="window", metavar="NAME[:KNOB=VALUE,…]",
        help=f"what a read sees of the memory: {', '.join(POLICIES)}; with knobs like top-frames:k=4",
    )  # fmt: skip
    names = " or ".join(bundled_refiners())
    about = (
        f"a refiner's file, or {names}: refines the noise between levels, for a pass a level more"
    )
    how.add_argument("--refiner", metavar="FILE|NAME", help=about)
    how.add_argument(
        "--refiner-strength", type=float, default=1.0, metavar="S", help="0 is the base (default 1)"
    )
    about = "nominal levels whose noise is refined; default: those it was trained for"
    how.add_argument("--refined-levels", type=levels, metavar="N,N,…", help=about)
    about = "merged is faster and takes a second copy of the weights; auto: merged where it fits"
    how.add_argument(
        "--refiner-form",
        type=refiner_form,
        default="auto",
        metavar="auto|merged|unmerged",
        help=about,
    )
    how.add_argument(
        "--dry-run", action="store_true", help="only say what would be made and the memory it takes"
    )
    add_machine(how)


def default_sizes() -> str:
    """The default size of published models, and those of bundles that differ."""
    sizes = {"": PUBLISHED_SIZE}
    for name, bundle in BUNDLES.items():
        if bundle.size != PUBLISHED_SIZE:
            sizes[f"{name} "] = bundle.size
    return "; ".join(f"{name}{width}x{height}" for name, (width, height) in sizes.items())


def add_machine(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)"
    )
    command.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="default bf16, on a CPU fp32"
    )


def options_of(args: argparse.Namespace) -> GenerateOptions:
    """The options that the arguments of `generate` give."""
    known = GenerateOptions.__dataclass_fields__
    named = {name: value for name, value in vars(args).items() if name in known}
    named["lora"] = tuple(args.lora or ())
    bundle = find_bundle(args.model)
    width, height = args.size or (bundle.size if bundle else PUBLISHED_SIZE)
    return GenerateOptions(**named, width=width, height=height)


def run_generate(args: argparse.Namespace) -> int:
    job = prepare(options_of(args))
    warn(summary(job), *notes(job))
    if args.dry_run:
        say(*job.estimate.lines().split("\n"))
        return 0
    return stream(job)


def summary(job: Job) -> str:
    """Describe the run in one line."""
    options, preset = job.options, job.preset
    window = "all" if preset.window < 0 else f"{preset.window}, sink {preset.sink}"
    refined = f", refined by {job.refiner.describe()}" if job.refiner else ""
    return (
        f"{options.frames} frames of {options.width}x{options.height}, preset {job.preset_name}"
        f" ({job.preset_reason}), levels"
        f" {','.join(map(str, preset.levels))}, {preset.chunk} latent frames a chunk, memory {window}, on {job.device}"
        f" in {str(job.dtype).removeprefix('torch.')}{refined}"
    )


def stream(job: Job) -> int:
    """Generate with a progress bar; an interrupt says what is left."""
    start, started_at = time.perf_counter(), time.time()
    with tqdm(total=job.options.frames, unit="frame", dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            level = progress.chunk.levels[progress.level].step
            bar.set_postfix_str(
                f"chunk {progress.chunk.index + 1}/{progress.chunks}, level {level}"
            )

        try:
            with closing(generate(job, show)) as progress:
                for frames in progress:
                    bar.update(frames - bar.n)
        except KeyboardInterrupt:
            settle()
            bar.close()
            warn(describe_stopped(job, started_at))
            return INTERRUPTED
    seconds = time.perf_counter() - start
    frames = job.options.frames
    say(
        f"{job.options.out}: {frames} frames in {seconds:.1f} s, {frames / seconds:.1f} frames/s, loading included"
    )
    return 0


def describe_stopped(job: Job, started_at: float) -> str:
    """Say what a stopped run has left, and how to go on from it."""
    video, latents = partial_path(job.options.out), job.options.outputs.stopped
    if not video.exists() or video.stat().st_mtime < started_at - CLOCK:  # an earlier run's
        return "stopped: no chunk was finished"
    message = f"stopped: {count_frames(video)} frames are in {video}"
    if job.options.save_latents:
        message += f"; go on with --extend {latents}"
    return message


def run_train(args: argparse.Namespace) -> int:
    with distributed(pick_device(args.device)) as device:
        if args.probe:
            result = run_probe(args.config, device, args.batches)
            if is_first():
                say(*result.lines())
            return 0
        path = run_training(args.config, device)
        if is_first():
            say(str(path))
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    path: Path = args.file
    if not path.is_dir():
        check_regular(path)
    if path.suffix.lower() == ".mp4":
        rows = {"kind": "video", "made": f"{count_frames(path)} frames"} | read_metadata(path)
    elif is_latents(path):
        info = inspect_latents(path)
        length = f"{info.frames} latent frames, {max(0, 4 * info.frames - 3)} pixel"
        rows = {
            "kind": "latents",
            "made": length + (", then a part of a chunk" if info.cut else ""),
        } | info.metadata
    else:
        say(*describe(inspect(path)).split("\n"))
        return 0
    say(*(f"{name:<9} {' '.join(value.split())}" for name, value in rows.items()))
    return 0


def run_presets(_: argparse.Namespace) -> int:
    say(*preset_table().split("\n"))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    if args.json:
        check_output(args.json)
    report = (bench_refiner if args.refiner else bench)(
        args.size, device, pick_dtype(args.dtype, device), args.chunks, args.window
    )
    say(*report.table().split("\n"))
    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return 0


def run_demo_command(args: argparse.Namespace) -> int:
    return run_demo(args, pick_device(args.device), train_on_demo)


def main(
    argv: list[str] | None = None,
    more: Mapping[str, tuple[AddCommand, RunCommand]] = MappingProxyType({}),
) -> int:
    """Run the command line; wrong input is one line on stderr and exit status 2.

    `more` are subcommands of the rooms above by name: what adds one to the parser, and what runs
    it.
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
    """Run one command; the exit status."""
    args = build_parser([add for add, _ in more.values()]).parse_args(argv)
    commands = {
        "generate": run_generate,
        "inspect": run_inspect,
        "bench": run_bench,
        "train": run_train,
    }
    commands |= {"demo": run_demo_command, "presets": run_presets}
    commands |= {name: run for name, (_, run) in more.items()}
    try:
        return commands[args.command](args)
    except (ValueError, OSError) as error:
        message = str(error)
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # torch's own for a GPU, a plain one for a CPU, Python's
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "Python's own objects").splitlines()[0]
        message = f"out of memory ({reason}): {SMALLER[args.command]}"
    warn(f"{ERROR}{' '.join(message.split())}")
    return 2


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, as Python, torch on a CPU and torch on a GPU say it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(
        error
    )


if __name__ == "__main__":
    sys.exit(main())
