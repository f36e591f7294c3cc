"""`autorefiner generate`: a prompt to a video."""

import argparse
import os
import time
from contextlib import closing, nullcontext
from pathlib import Path

from tqdm import tqdm

from ..bundles import BUNDLES, PUBLISHED_SIZE, bundled_refiners, find_bundle
from ..files import partial_path
from ..fit import fit
from ..generate import generate
from ..job import Job, notes, prepare
from ..memory.policies import POLICIES
from ..memory.positions import POSITIONS
from ..memory.stores import DEFAULT_STORE, STORES
from ..noise.sources import NOISES
from ..prompt_timeline import EXTENDED, MOST_BYTES
from ..reading import read_text
from ..request import GenerateOptions
from ..rollout import Progress
from ..samplers import METHODS, SEARCHES
from ..schedule import PRESETS
from ..stopping import INTERRUPTED, handling, interrupt, settle
from ..terminal import say, warn
from ..verifiers import REWARDS
from ..video import count_frames
from .arguments import (
    add_acceleration,
    add_machine,
    budget,
    falling_levels,
    frames,
    levels,
    lora,
    refiner_form,
    size,
)

CLOCK = 1.0  # seconds that a file system's clock may lag
GENERATE = """\
Sample a video chunk by chunk and write each chunk to the file as soon as it is sampled.

  autorefiner generate --model sprites --prompt "a red star circles on a navy ground" --out star.mp4
  autorefiner generate --model self_forcing_dmd.pt --text-encoder umt5-xxl/ --vae Wan2.1_VAE.pth \\
      --prompt "a red fox in the snow" --frames 81 --size 832x480 --out fox.mp4

Stopped with Ctrl-C (or killed), it leaves fox.partial.mp4 with every finished chunk. A run with
--save-latents can be continued: the same command with --extend fox.latents.partial.safetensors
writes the video that the uninterrupted run would have written.

With --frames endless, Ctrl-C is the end: the chunk in progress is finished and fox.mp4 is whole."""


def add_generate(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand `generate`."""
    command = commands.add_parser(
        "generate",
        help="prompt to video",
        description=GENERATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(command.add_argument_group("model"))
    add_video(command.add_argument_group("video"))
    about = "A preset says how a model was trained to be sampled; the rest overrides it."
    sampling = command.add_argument_group("sampling", about)
    add_sampling(sampling)
    add_refiner(sampling)
    about = "only say what would be sampled and how much memory it takes"
    sampling.add_argument("--dry-run", action="store_true", help=about)
    add_machine(sampling)
    add_acceleration(sampling)


def add_model(group: argparse._ArgumentGroup) -> None:
    """Add the options that name files of models."""
    names = " or ".join(BUNDLES)
    about = f"a checkpoint as published (.pt, .safetensors), or a bundled one: {names}"
    group.add_argument("--model", required=True, metavar="FILE|NAME", help=about)
    about = (
        "where a file holds both: averaged (ema) or last (raw); default: what its authors sample"
        " with"
    )
    group.add_argument("--weights", choices=("auto", "ema", "raw"), default="auto", help=about)
    about = (
        "a LoRA to merge on load, strength 1 unless given; may be repeated (LongLive 1 needs its"
        " own)"
    )
    group.add_argument("--lora", type=lora, action="append", metavar="FILE[:STRENGTH]", help=about)
    group.add_argument("--vae", type=Path, metavar="FILE", help="Wan2.1's VAE")
    about = "umT5-xxl, a folder or a file"
    group.add_argument("--text-encoder", type=Path, metavar="PATH", help=about)
    about = "its tokenizer, if it does not lie beside it"
    group.add_argument("--tokenizer", type=Path, metavar="PATH", help=about)
    about = "keep encoded prompts here"
    group.add_argument("--context-cache", type=Path, metavar="FOLDER", help=about)
    about = "an encoded prompt instead of a text encoder"
    group.add_argument("--context", type=Path, metavar="FILE", help=about)


def add_video(group: argparse._ArgumentGroup) -> None:
    """Add the options that describe the video and name its files."""
    about = "what to show, as the model's authors prompt it"
    group.add_argument("--prompt", default="", help=about)
    about = (
        "prompts by time in place of --prompt, like '0s a red star circles | 5s a blue ring': a"
        " file, or the text itself; docs/timeline.md"
    )
    group.add_argument("--timeline", metavar="FILE|TEXT", help=about)
    about = (
        "how a prompt takes over: keep, recache N, flush N, cut or #; default: the preset's in a"
        f" timeline, {EXTENDED} for a new prompt with --extend"
    )
    group.add_argument("--transition", metavar="NAME", help=about)
    about = "pixel frames of the whole video, 1 + 4n (default 81), or endless: until Ctrl-C"
    group.add_argument("--frames", type=frames, default=81, metavar="N|endless", help=about)
    about = f"multiples of 16 (default {default_sizes()})"
    group.add_argument("--size", type=size, metavar="WxH", help=about)
    about = "the same seed gives the same noise on any device"
    group.add_argument("--seed", type=int, default=0, help=about)
    about = "latents of an earlier run to go on from"
    group.add_argument("--extend", type=Path, metavar="FILE", help=about)
    group.add_argument("--out", type=Path, required=True, metavar="FILE.mp4")
    about = "replace a video that is there already"
    group.add_argument("--overwrite", action="store_true", help=about)
    about = "write latents beside the video, to go on from later"
    group.add_argument("--save-latents", action="store_true", help=about)
    group.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a contact sheet, too")


def add_sampling(group: argparse._ArgumentGroup) -> None:
    """Add the preset and the options that override it."""
    about = "default: what the file's name or metadata proves; `autorefiner presets` lists them"
    group.add_argument("--preset", choices=PRESETS, metavar="NAME", help=about)
    about = "nominal, falling from 1000"
    group.add_argument("--levels", "--steps", type=falling_levels, metavar="N,N,…", help=about)
    about = (
        "latent frames held in memory (sink + past + current chunk), -1 all; with a window, memory"
        " does not grow with length"
    )
    group.add_argument("--window", type=int, metavar="FRAMES", help=about)
    about = "of the window, first frames of the video that stay"
    group.add_argument("--sink", type=int, metavar="FRAMES", help=about)
    knobs = "NAME[:KNOB=VALUE,…]"
    about = f"{', '.join(METHODS)}; with knobs like self-refine:threshold=0.2"
    group.add_argument("--method", default="self-forcing", metavar=knobs, help=about)
    about = f"of {' or '.join(SEARCHES)} (default 5); the time grows with it"
    group.add_argument("--candidates", type=int, metavar="N", help=about)
    about = (
        f"what they choose by: {', '.join(REWARDS)}; a CLIP model's folder is a knob,"
        " clip:path=FOLDER; may be repeated with weights"
    )
    group.add_argument("--reward", action="append", metavar=knobs, help=about)
    about = (
        f"which frames in memory a chunk attends to: {', '.join(POLICIES)}; with knobs like"
        " top-frames:k=4; default: the preset's"
    )
    group.add_argument("--memory", "--policy", metavar=knobs, help=about)
    about = (
        f"temporal positions of the frames in memory: {', '.join(POSITIONS)}; with knobs like"
        " flex:scale=0.25 (default: the preset's)"
    )
    group.add_argument("--positions", metavar=knobs, help=about)
    about = (
        "how keys and values lie in memory: as they are (plain), in half the bytes (int8), or in"
        f" host memory (offload); default: {DEFAULT_STORE}"
    )
    group.add_argument("--store", choices=STORES, help=about)
    about = (
        "bytes that the run may take, like 8GB: chooses refiner form, store and window, as far as"
        " they are not given"
    )
    group.add_argument("--fit", type=budget, metavar="SIZE", help=about)
    about = (
        "multiply in fp8 in the transformer's blocks: half the bytes of their weights; for GPUs"
        " of CUDA compute capability 8.9 or higher"
    )
    group.add_argument("--fp8", action="store_true", help=about)
    about = f"{', '.join(NOISES)}; with knobs like antiphase:rho=0.2"
    group.add_argument("--noise", default="white", metavar=knobs, help=about)
    about = (
        "chunks to draw again and where to end: `reroll CHUNK [TIMES]`, `keep CHUNK`, `extend"
        " CHUNKS`, with ; between"
    )
    group.add_argument("--recipe", default="", metavar="TEXT", help=about)


def add_refiner(group: argparse._ArgumentGroup) -> None:
    """Add the options of the refiner."""
    names = " or ".join(bundled_refiners())
    about = (
        f"a refiner's file, or {names}: refines the noise between levels, which takes one more"
        " pass per level"
    )
    group.add_argument("--refiner", metavar="FILE|NAME", help=about)
    about = "0 is the base (default 1)"
    group.add_argument("--refiner-strength", type=float, default=1.0, metavar="S", help=about)
    about = "nominal levels whose noise is refined; default: those it was trained for"
    group.add_argument("--refined-levels", type=levels, metavar="N,N,…", help=about)
    forms = "auto|merged|unmerged"
    about = "merged is faster and takes a second copy of the weights; auto: merged where it fits"
    group.add_argument(
        "--refiner-form", type=refiner_form, default="auto", metavar=forms, help=about
    )


def default_sizes() -> str:
    """The default size of published models, and those of bundles that differ."""
    sizes = {"": PUBLISHED_SIZE}
    for name, bundle in BUNDLES.items():
        if bundle.size != PUBLISHED_SIZE:
            sizes[f"{name} "] = bundle.size
    return "; ".join(f"{name}{width}x{height}" for name, (width, height) in sizes.items())


def options_of(args: argparse.Namespace) -> GenerateOptions:
    """Turn parsed arguments into a request."""
    known = GenerateOptions.__dataclass_fields__
    named = {name: value for name, value in vars(args).items() if name in known}
    named["lora"] = tuple(args.lora or ())
    if named.get("reward"):
        named["reward"] = tuple(named["reward"])
    else:
        named.pop("reward", None)
    if named.get("timeline") is not None:
        named["timeline"] = timeline_text(named["timeline"])
    bundle = find_bundle(args.model)
    width, height = args.size or (bundle.size if bundle else PUBLISHED_SIZE)
    return GenerateOptions(**named, width=width, height=height)


def timeline_text(given: str) -> str:
    """Return the text of a timeline: the content of the file that is named, or the given text."""
    if os.path.isfile(given):
        return read_text(Path(given), MOST_BYTES)
    if not given.strip() or given.endswith((".txt", ".json")):
        raise ValueError(f"--timeline {given!r}: give an existing file, or a text of prompts")
    return given


def run_generate(args: argparse.Namespace) -> int:
    """Generate a video, or with --dry-run print its memory estimate."""
    options = options_of(args)
    fitted = fit(options, args.fit) if args.fit else None
    job = fitted.job if fitted else prepare(options)
    warn(summary(job), *([str(fitted)] if fitted else []), *prompt_lines(job), *notes(job))
    if args.dry_run:
        say(*job.estimate.lines().split("\n"))
        return 0
    return stream(job)


def prompt_lines(job: Job) -> list[str]:
    """List where each prompt of a timeline starts."""
    return str(job.timeline).split("\n") if len(job.prompts) > 1 else []


def summary(job: Job) -> str:
    """Describe the run in one line."""
    options, preset = job.options, job.preset
    window = "all" if preset.window < 0 else f"{preset.window}, sink {preset.sink}"
    policy = "" if job.memory == "window" else f", {job.memory}"
    policy += f", positions {options.positions}" if options.positions else ""
    policy += "" if job.store == DEFAULT_STORE else f", store {job.store}"
    noise = "" if options.noise == "white" else f", noise {options.noise}"
    products = ", products in fp8" if options.fp8 else ""
    refined = f", refined by {job.refiner.describe()}" if job.refiner else ""
    judged = f" by {job.search.describe()}" if job.search else ""
    length = "endless" if job.plan.endless else f"{options.frames} frames"
    return (
        f"{length} of {options.width}x{options.height}, preset {job.preset_name}"
        f" ({job.preset_reason}), levels {','.join(map(str, preset.levels))}, {preset.chunk} latent"
        f" frames a chunk, method {options.sampler}{judged}, memory {window}{policy}{noise}, on"
        f" {job.device} in {str(job.dtype).removeprefix('torch.')}{products}{refined}"
    )


class Stream:
    """A progress bar and, in an endless run, the first Ctrl-C, which lets a chunk be finished."""

    def __init__(self, job: Job, bar: tqdm) -> None:
        self.job, self.bar = job, bar
        self.chunk = -1  # index of the one in progress
        self.predictions = 0  # of that chunk
        self.stopping = False

    def show(self, progress: Progress) -> None:
        """Show the chunk and level of a prediction, and of a search how many it needs."""
        chunk = progress.chunk
        self.predictions = self.predictions + 1 if chunk.index == self.chunk else 1
        self.chunk = chunk.index
        total = f"/{progress.chunks}" if progress.chunks else ""
        text = f"chunk {chunk.index + 1}{total}, level {chunk.levels[progress.level].step}"
        if self.job.search:
            text += f", prediction {self.predictions}/{self.job.method.passes(chunk)}"
        if self.stopping:
            text += ", stopping after this chunk (Ctrl-C again to stop now)"
        self.bar.set_postfix_str(text)

    def stop(self, *_: object) -> None:
        """Stop after the chunk in progress; at once if there is none or it is asked again."""
        if self.stopping or self.chunk < 0:
            interrupt()
        self.stopping = True  # shown with the next prediction: a signal must not print


def stream(job: Job) -> int:
    """Generate with a progress bar; an interrupt says what is left."""
    start, started_at, frames = time.perf_counter(), time.time(), 0
    with tqdm(total=job.options.frames, unit="frame", dynamic_ncols=True) as bar:
        view = Stream(job, bar)
        stopping = handling(view.stop) if job.plan.endless else nullcontext()
        try:
            with stopping, closing(generate(job, view.show, lambda: view.stopping)) as progress:
                for frames in progress:
                    bar.update(frames - bar.n)
        except KeyboardInterrupt:
            settle()
            bar.close()
            warn(describe_stopped(job, started_at))
            return INTERRUPTED
    seconds = time.perf_counter() - start
    compiling = job.acceleration.compiler.seconds
    counted = f"loading and {compiling:.1f} s of compiling" if compiling else "loading"
    rate = f"{frames / seconds:.1f} frames/s, {counted} included"
    say(f"{job.options.out}: {frames} frames in {seconds:.1f} s, {rate}")
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
