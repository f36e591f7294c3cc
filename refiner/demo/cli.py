"""autorefiner demo: train, measure and show the models of the sprite world."""

import argparse
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

from ..training.log import read_rows
from ..training.loop import RUNS, LoopOptions, Stage, keep_freed_memory, train
from .bundle import (
    WEIGHTS,
    load_sprite_network,
    load_sprite_text,
    load_sprite_vae,
    recipe_of,
    save_model,
)
from .evaluation import EvaluateOptions, evaluate, write_section
from .leverage import LeverageOptions, leverage
from .long import LongOptions, long_videos
from .recipes.data import Clips, encode_shards
from .recipes.failures import FILE as FAILURES
from .recipes.failures import Failures, sample_failures
from .recipes.reward import RewardOptions, RewardStage
from .recipes.student import CausalInitStage, DistilOptions, DistilStage, InitOptions
from .recipes.teacher import LongerOptions, TeacherOptions, TeacherStage
from .recipes.text import TextOptions, TextStage
from .recipes.tiny import TinyOptions, TinyStage
from .recipes.vae import DecoderOptions, DecoderStage, VaeOptions, VaeStage
from .rows import Train
from .show import show
from .tables import REWARDED, SECTIONS, TABLES, TRAINING, TablesOptions, make_tables
from .transitions import TransitionOptions, transitions

STAGES = (
    "vae", "decoder", "text", "clips", "tiny", "teacher", "longer", "init", "student", "failures",
    "reward",
)  # fmt: skip
GOES_ON = {"decoder": "vae", "longer": "teacher", "student": "student"}  # stage -> model it resumes
DEFAULT = "default %(default)s"
TRAIN = """\
Train the demo's models on the sprite world, one stage or all in order. A run can be stopped or
killed at any time; the same command goes on with it. Each stage writes state.pt, log.jsonl,
loss.png and sample sheets into RUN/STAGE, and its finished model into RUN. Later stages read the
models of the earlier ones from there."""


def add_demo(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand and its actions."""
    demo = commands.add_parser("demo", help="the sprite world and the models trained on it")
    actions = demo.add_subparsers(dest="action", required=True)
    measures = (add_evaluate, add_leverage, add_tables, add_long, add_transitions)
    for add in (add_train, add_show, *measures):
        command = add(actions)
        about = "cpu or cuda (default: a GPU if there is one)"
        command.add_argument("--device", default="auto", help=about)


def add_train(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = actions.add_parser(
        "train", description=TRAIN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command.add_argument
    add("stage", choices=(*STAGES, "all"))
    add("--run", type=Path, default=RUNS / "sprites", metavar="FOLDER", help=DEFAULT)
    about = "steps of the stage (of each, with all); default: the recipe's"
    add("--steps", type=int, help=about)
    add("--batch", type=int, help="clips a step; default: the recipe's")
    about = (
        "held-out captions of each sample sheet's scores, of the networks' stages; default: the"
        " recipe's"
    )
    add("--shown", type=int, help=about)
    about = "of 64 clips each, to encode (default %(default)s)"
    add("--shards", type=int, default=320, help=about)
    about = "clips of the student to sample for the reward model (default %(default)s)"
    add("--failures", type=int, default=192, help=about)
    about = (
        "compile the networks' stages, on a GPU the teacher's: 1.3 to 1.8 times as fast; needs a"
        " C++ compiler"
    )
    add("--compile", action="store_true", help=about)
    add("--save-every", type=int, default=100, metavar="STEPS")
    add("--show-every", type=int, default=500, metavar="STEPS")
    return command


def add_evaluate(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    about = (
        "Score the bundled models on held-out captions and write the table into a Markdown file."
    )
    command = actions.add_parser("evaluate", help="the results table", description=about)
    add = command.add_argument
    add("--models", type=Path, default=WEIGHTS, metavar="FOLDER", help="default: the bundle")
    add("--captions", type=int, default=256)
    add("--long-captions", type=int, default=32, help="of clips four times as long")
    add("--pairs", type=int, default=64, help="captions of which two seeds are compared")
    add("--teacher-steps", type=int, default=50)
    add_results(command)
    return command


def add_show(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    about = "Make clips of prompts that the bundled model is weak at, without and with its refiner."
    command = actions.add_parser("show", help="a first look", description=about)
    add = command.add_argument
    add("--out", type=Path, default=Path("outputs"), metavar="FOLDER", help=DEFAULT)
    add("--clips", type=int, default=8)
    add("--seed", type=int, default=0)
    return command


def add_leverage(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    about = (
        "Train for a reward that any noise could raise, by each method, and write the gains into a"
        " Markdown file."
    )
    command = actions.add_parser("leverage", help="which noises can move a clip", description=about)
    command.add_argument("--updates", type=int, default=60)
    add_results(command)
    return command


def add_tables(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    about = "Train what is missing, and write the paper's tables in miniature into a Markdown file."
    command = actions.add_parser("tables", help="the paper's tables", description=about)
    add = command.add_argument
    add("--run", type=Path, default=RUNS / "tables", metavar="FOLDER", help=DEFAULT)
    add("--quick", action="store_true", help="try the command on next to nothing")
    add("--tables", type=int, nargs="+", choices=TABLES, default=TABLES, help="default: all")
    add("--captions", type=int, help="held-out captions (default 96)")
    add("--steps", type=int, help=f"of each row trained by dmd (default {TRAINING.steps})")
    about = f"of each row trained by reward (default {REWARDED.steps})"
    add("--reward-steps", type=int, help=about)
    add("--short-steps", type=int, help="of each row of Tables 4 and 6 (default 120)")
    add("--compile", action="store_true", help="compile the trainings; needs a C++ compiler")
    add("--trained", action="store_true", help="leave out rows that are not trained yet")
    about = (
        "time the rows of Tables 2 and 8 anew, in three rounds of a batch each, where the machine"
        " was busy before"
    )
    add("--time", action="store_true", help=about)
    add_results(command)
    return command


def add_long(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    about = (
        "Measure clips of 4 and 16 times the trained length under each memory, and write the tables"
        " into a Markdown file. A run that was stopped goes on with the next row."
    )
    command = actions.add_parser("long", help="long videos by memory", description=about)
    add = command.add_argument
    add("--run", type=Path, default=RUNS / "long", metavar="FOLDER", help=DEFAULT)
    about = "time all rows anew, where the machine was busy before"
    add("--time", action="store_true", help=about)
    about = "times the trained length, and captions (default 4:32 16:16)"
    add("--lengths", type=length, nargs="+", metavar="TIMES:CAPTIONS", help=about)
    add_results(command)
    return command


def add_transitions(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    about = (
        "Measure how many chunks a new caption needs until it rules, by transition and window, and"
        " write the table into a Markdown file. A run that was stopped goes on with the next row."
    )
    command = actions.add_parser("transitions", help="prompt switches", description=about)
    add = command.add_argument
    add("--run", type=Path, default=RUNS / "transitions", metavar="FOLDER", help=DEFAULT)
    add("--pairs", type=int, default=16, help="of captions (default %(default)s)")
    add("--chunks", type=int, default=6, help="to watch after a switch (default %(default)s)")
    add_results(command)
    return command


def length(text: str) -> tuple[int, int]:
    """Parse `4:32`: times the trained length, captions."""
    times, _, captions = text.partition(":")
    if not (times.isdecimal() and captions.isdecimal() and int(times) and int(captions)):
        raise argparse.ArgumentTypeError(f"{text!r}: give TIMES:CAPTIONS, like 4:32")
    return int(times), int(captions)


def add_results(command: argparse.ArgumentParser) -> None:
    results = Path("RESULTS.md")
    command.add_argument("--out", type=Path, default=results, metavar="FILE.md", help=DEFAULT)


def run_demo(args: argparse.Namespace, device: torch.device, train_row: Train) -> int:
    """Run an action of `autorefiner demo`; `train_row` trains a row of the tables."""
    if args.action == "evaluate":
        options = EvaluateOptions(args.captions, args.long_captions, args.pairs, args.teacher_steps)
        write_and_print(args.out, "The bundled models", evaluate(args.models, options, device))
    elif args.action == "leverage":
        write_and_print(args.out, "Leverage", leverage(LeverageOptions(args.updates), device))
    elif args.action == "long":
        options = LongOptions(tuple(args.lengths)) if args.lengths else LongOptions()
        body = long_videos(args.run, options, device, args.time)
        write_and_print(args.out, "Long videos", body)
    elif args.action == "transitions":
        options = TransitionOptions(args.pairs, args.chunks)
        write_and_print(args.out, "Prompt switches", transitions(args.run, options, device))
    elif args.action == "show":
        for line in show(args.out, args.clips, args.seed, device):
            print(line)
    elif args.action == "tables":
        run_tables(args, device, train_row)
    else:
        for stage in STAGES if args.stage == "all" else (args.stage,):
            train_stage(stage, args, device)
    return 0


def write_and_print(path: Path, title: str, body: str) -> None:
    """Write a section into a Markdown file and print it."""
    write_section(path, title, body)
    print(body)


def run_tables(args: argparse.Namespace, device: torch.device, train_row: Train) -> None:
    """Write the tables, a section for each of SECTIONS."""
    options = tables_options(args)
    for title, group in SECTIONS.items():
        numbers = tuple(number for number in options.tables if number in group)
        if numbers:
            some = replace(options, tables=numbers)
            train = None if args.trained else train_row
            body = make_tables(args.run, some, device, train, args.time)
            write_and_print(args.out, title, body)


def tables_options(args: argparse.Namespace) -> TablesOptions:
    """Return the options of the command line."""
    options = TablesOptions.quick() if args.quick else TablesOptions()
    options = replace(options, tables=tuple(args.tables))
    if args.captions is not None:
        options = replace(options, captions=args.captions)
    if args.short_steps is not None:
        options = replace(options, short=args.short_steps)
    trainings = {"training": args.steps, "two_levels": args.steps, "rewarded": args.reward_steps}
    for name, steps in trainings.items():
        training = replace(getattr(options, name), compiled=args.compile)
        if steps is not None:
            training = replace(training, steps=steps)
        options = replace(options, **{name: training})
    return options


def train_stage(name: str, args: argparse.Namespace, device: torch.device) -> None:
    """Train one stage to its end and write its model into the run's folder."""
    if device.type == "cpu":
        keep_freed_memory()
    run: Path = args.run
    if name == "clips":
        encode_shards(load_sprite_vae(run).to(device), run / "clips", args.shards)
        return
    if name == "failures":
        if (run / FAILURES).exists():
            return
        text, vae = load_sprite_text(run).to(device), load_sprite_vae(run).to(device)
        student = load_sprite_network("student", run, device)
        sample_failures(student, text, vae, args.failures).write(run)
        return
    stage = make_stage(name, args, device)
    steps = stage.options.steps
    print(f"{name}: {steps} steps on {device} in {run / name}")
    train(stage, LoopOptions(run / name, steps, args.save_every, args.show_every))
    recipe = {"recipe": name, "steps": steps, "commit": own_commit(), **figures_of(run / name)}
    if name in GOES_ON:
        recipe["before"] = earlier_recipes(run, GOES_ON[name], name)
    save_stage(name, stage, run, recipe)


def save_stage(name: str, stage: Stage, run: Path, recipe: dict) -> None:
    """Write the model of a finished stage into the run's folder, with its recipe."""
    if name in ("vae", "decoder"):
        save_model(run, "vae", stage.finished(), None, recipe)
    elif name == "tiny":
        save_model(run, "tiny", stage.finished(), None, recipe)
    elif name == "text":
        save_model(run, "text", stage.learner.average.encoder, None, recipe)
    elif name == "reward":
        save_model(run, "reward", stage.finished(), None, recipe)
    elif name in ("teacher", "longer"):
        save_model(run, "teacher", stage.learner.average, stage.network.config, recipe)
    else:  # the student starts from the causal initialisation, and replaces it
        model = stage.generator.average if name == "student" else stage.learner.average
        recipe = recipe | {"preset": "self-forcing"}
        save_model(run, "student", model, stage.network.config, recipe)


def earlier_recipes(run: Path, model: str, recipe: str) -> list[dict]:
    """Return the recipes and steps that trained a run's model before this recipe."""
    last = recipe_of(model, run)
    before = last.get("before", [])
    if last.get("recipe") in (None, recipe):  # this recipe was completed before
        return before
    return [*before, {key: last[key] for key in ("recipe", "steps")}]


def own_commit() -> str:
    """Return the commit of the running code; "unknown" outside a checkout."""
    command = ["git", "-C", str(WEIGHTS.parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def figures_of(run: Path) -> dict:
    """Return a finished run's last figures, and the totals of its sheets by step."""
    log = read_rows(run / "log.jsonl")
    shown = {name: value for name, value in log[-1].items() if name not in ("step", "seconds")}
    figures: dict[str, dict] = {"scores": {name: round(value, 3) for name, value in shown.items()}}
    totals = {row["step"] + 1: round(row["total"], 1) for row in log if "total" in row}
    if totals:
        figures["totals"] = totals
    return figures


def make_stage(name: str, args: argparse.Namespace, device: torch.device) -> Stage:
    """Create a stage with the earlier stages' models from the run's folder."""
    changes = {"steps": args.steps, "batch": args.batch}
    changes = {key: value for key, value in changes.items() if value is not None}
    if name == "vae":
        return VaeStage(VaeOptions(**changes), device)
    if name == "text":
        return TextStage(TextOptions(**changes), device)
    if name == "decoder":
        return DecoderStage(DecoderOptions(**changes), load_sprite_vae(args.run).to(device))
    if name == "tiny":
        clips, vae = Clips.read(args.run / "clips"), load_sprite_vae(args.run).to(device)
        return TinyStage(TinyOptions(**changes), clips, vae)
    if args.shown is not None:
        changes["shown"] = args.shown
    if name == "reward":
        return RewardStage(RewardOptions(**changes), device, Failures.read(args.run))
    # on a GPU the other stages replay CUDA graphs instead
    can_compile = device.type == "cpu" or name in ("teacher", "longer")
    changes["compiled"] = args.compile and can_compile
    return make_network_stage(name, changes, args.run, device)


def make_network_stage(name: str, changes: dict, run: Path, device: torch.device) -> Stage:
    """Create a stage that trains a network on encoded clips."""
    text, vae = load_sprite_text(run).to(device), load_sprite_vae(run).to(device)
    models = Clips.read(run / "clips"), text, vae
    if name == "teacher":
        return TeacherStage(TeacherOptions(**changes), *models, device)
    teacher = load_sprite_network("teacher", run, device)
    if name == "longer":
        return TeacherStage(LongerOptions(**changes), *models, device, teacher)
    if name == "init":
        return CausalInitStage(InitOptions(**changes), *models, device)
    student = load_sprite_network("student", run, device)
    return DistilStage(DistilOptions(**changes), student, teacher, *models)
