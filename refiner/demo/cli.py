"""autorefiner demo: train the bundled models by their recipes."""

import argparse
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

from ..training.log import read_rows
from ..training.loop import RUNS, LoopOptions, Stage, keep_freed_memory, train
from .bundle import WEIGHTS, load_sprite_network, load_sprite_text, load_sprite_vae, recipe_of, save_model
from .evaluation import EvaluateOptions, evaluate, write_section
from .leverage import LeverageOptions, leverage
from .recipes.data import Clips, encode_shards
from .recipes.reward import RewardOptions, RewardStage
from .recipes.student import CausalInitStage, DistilOptions, DistilStage, InitOptions, SmallInitOptions
from .recipes.teacher import LongerOptions, TeacherOptions, TeacherStage
from .recipes.text import TextOptions, TextStage
from .recipes.vae import DecoderOptions, DecoderStage, VaeOptions, VaeStage, preview_map
from .rows import Train
from .show import show
from .tables import REWARDED, TABLES, TRAINING, TWO_LEVEL_TABLES, TablesOptions, make_tables

STAGES = ("vae", "decoder", "text", "clips", "teacher", "longer", "init", "student", "reward")
SMALL = "small"  # in the place of init: a student a fifth of the teacher's size
GOES_ON = {"decoder": "vae", "longer": "teacher", "student": "student"}  # what trains a model that another recipe began
TRAIN = """\
Train the demo's models on the sprite world, one stage or all in order. A run can be stopped or killed at any time; the
same command goes on with it. Each stage writes state.pt, log.jsonl, loss.png and sample sheets into RUN/STAGE, and its
finished model into RUN. Later stages read the models of the earlier ones from there. `small`, in the place of `init`,
begins a student a fifth of the teacher's size."""


def add_demo(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand and its own."""
    demo = commands.add_parser("demo", help="the sprite world and the models trained on it")
    actions = demo.add_subparsers(dest="action", required=True)
    command = actions.add_parser("train", description=TRAIN, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("stage", choices=(*STAGES, SMALL, "all"))
    command.add_argument("--run", type=Path, default=RUNS / "sprites", metavar="FOLDER", help="default %(default)s")
    command.add_argument("--steps", type=int, help="steps of the stage (of each, with all); default: the recipe's")
    command.add_argument("--batch", type=int, help="clips a step; default: the recipe's")
    about = "held-out captions of each sample sheet's scores, of the networks' stages; default: the recipe's"
    command.add_argument("--shown", type=int, help=about)
    command.add_argument("--shards", type=int, default=320, help="of 64 clips each, to encode (default %(default)s)")
    about = "compile the networks' stages, on a GPU the teacher's: 1.3 to 1.8 times as fast; needs a C++ compiler"
    command.add_argument("--compile", action="store_true", help=about)
    command.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    command.add_argument("--show-every", type=int, default=500, metavar="STEPS")
    command.add_argument("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")

    about = "Score the bundled models on held-out captions and write the table into a Markdown file."
    command = actions.add_parser("evaluate", help="the results table", description=about)
    command.add_argument("--models", type=Path, default=WEIGHTS, metavar="FOLDER", help="default: the bundle")
    command.add_argument("--captions", type=int, default=256)
    command.add_argument("--long-captions", type=int, default=32, help="of clips four times as long")
    command.add_argument("--pairs", type=int, default=64, help="captions of which two seeds are compared")
    command.add_argument("--teacher-steps", type=int, default=50)
    command.add_argument("--out", type=Path, default=Path("RESULTS.md"), metavar="FILE.md", help="default %(default)s")
    command.add_argument("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")

    about = "Make clips of a few prompts with the bundled models, base and refined side by side."
    command = actions.add_parser("show", help="a first look", description=about)
    command.add_argument("--out", type=Path, default=Path("outputs"), metavar="FOLDER", help="default %(default)s")
    command.add_argument("--clips", type=int, default=4)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")

    about = "Train for a reward that any noise could raise, by each method, and write the gains into a Markdown file."
    command = actions.add_parser("leverage", help="which noises can move a clip", description=about)
    command.add_argument("--updates", type=int, default=60)
    command.add_argument("--out", type=Path, default=Path("RESULTS.md"), metavar="FILE.md", help="default %(default)s")
    command.add_argument("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")

    about = "Train what is missing, and write the paper's tables in miniature into a Markdown file."
    command = actions.add_parser("tables", help="the paper's tables", description=about)
    command.add_argument("--run", type=Path, default=RUNS / "tables", metavar="FOLDER", help="default %(default)s")
    command.add_argument("--quick", action="store_true", help="try the command on next to nothing")
    command.add_argument("--tables", type=int, nargs="+", choices=TABLES, default=TABLES, help="default: all")
    command.add_argument("--captions", type=int, help="held-out captions (default 96)")
    command.add_argument("--steps", type=int, help=f"of each row trained by dmd (default {TRAINING.steps})")
    about = f"of each row trained by reward (default {REWARDED.steps})"
    command.add_argument("--reward-steps", type=int, help=about)
    command.add_argument("--short-steps", type=int, help="of each row of Tables 4 and 6 (default 120)")
    command.add_argument("--compile", action="store_true", help="compile the trainings; needs a C++ compiler")
    about = "time the rows of Table 2 anew, in three rounds of a batch each, where the machine was busy before"
    command.add_argument("--time", action="store_true", help=about)
    command.add_argument("--out", type=Path, default=Path("RESULTS.md"), metavar="FILE.md", help="default %(default)s")
    command.add_argument("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")


def tables_options(args: argparse.Namespace) -> TablesOptions:
    """As the command line says."""
    options = TablesOptions.quick() if args.quick else TablesOptions()
    given = {"captions": args.captions, "short": args.short_steps}
    options = replace(options, tables=tuple(args.tables), **{k: v for k, v in given.items() if v is not None})
    trainings = {"training": args.steps, "two_levels": args.steps, "rewarded": args.reward_steps}
    for name, steps in trainings.items():
        training = replace(getattr(options, name), compiled=args.compile)
        options = replace(options, **{name: training if steps is None else replace(training, steps=steps)})
    return options


def run_demo(args: argparse.Namespace, device: torch.device, train_row: Train) -> int:
    """Run an action of `autorefiner demo`; `train_row` trains a row of the tables."""
    if args.action == "evaluate":
        options = EvaluateOptions(args.captions, args.long_captions, args.pairs, args.teacher_steps)
        body = evaluate(args.models, options, device)
        write_section(args.out, "The bundled models", body)
        print(body)
        return 0
    if args.action == "leverage":
        body = leverage(LeverageOptions(args.updates), device)
        write_section(args.out, "Leverage", body)
        print(body)
        return 0
    if args.action == "show":
        for line in show(args.out, args.clips, args.seed, device):
            print(line)
        return 0
    if args.action == "tables":
        options = tables_options(args)
        sections = {"The refiner": tuple(n for n in options.tables if n not in TWO_LEVEL_TABLES)}
        sections["A sampler of two levels"] = tuple(n for n in options.tables if n in TWO_LEVEL_TABLES)
        for title, numbers in sections.items():
            if numbers:
                body = make_tables(args.run, replace(options, tables=numbers), device, train_row, args.time)
                write_section(args.out, title, body)
                print(body)
        return 0
    for stage in STAGES if args.stage == "all" else (args.stage,):
        train_stage(stage, args, device)
    return 0


def train_stage(name: str, args: argparse.Namespace, device: torch.device) -> None:
    """Train one stage to its end and write its model into the run's folder."""
    if device.type == "cpu":
        keep_freed_memory()
    run: Path = args.run
    if name == "clips":
        encode_shards(load_sprite_vae(run).to(device), run / "clips", args.shards)
        return
    stage = make_stage(name, args, device)
    steps = stage.options.steps
    print(f"{name}: {steps} steps on {device} in {run / name}")
    train(stage, LoopOptions(run / name, steps, args.save_every, args.show_every))
    told = {"recipe": name, "steps": steps, "commit": own_commit(), **figures_of(run / name)}
    if name in GOES_ON:
        told["before"] = earlier_recipes(run, GOES_ON[name], name)
    if name in ("vae", "decoder"):
        vae = stage.finished()
        save_model(run, "vae", vae, None, told | {"preview": preview_map(vae)})
    elif name == "text":
        save_model(run, "text", stage.learner.average.encoder, None, told)
    elif name == "reward":
        save_model(run, "reward", stage.finished(), None, told)
    elif name in ("teacher", "longer"):
        save_model(run, "teacher", stage.learner.average, stage.network.config, told)
    else:  # the causal initialisation is what the student starts from, and is replaced by it
        model = stage.generator.average if name == "student" else stage.learner.average
        save_model(run, "student", model, stage.network.config, told | {"preset": "self-forcing"})


def earlier_recipes(run: Path, model: str, recipe: str) -> list[dict]:
    """Recipes and steps that a model in the run's folder was trained by before this recipe."""
    told = recipe_of(model, run)
    before = told.get("before", [])
    if told.get("recipe") in (None, recipe):  # the recipe's own end, come to once more
        return before
    return [*before, {key: told[key] for key in ("recipe", "steps")}]


def own_commit() -> str:
    """Of the code that runs, where it lies in a checkout."""
    command = ["git", "-C", str(WEIGHTS.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def figures_of(run: Path) -> dict:
    """Loss and scores of a finished run's last step, whose sample sheet is always drawn; totals of all its sheets by
    steps taken, where they have one."""
    log = read_rows(run / "log.jsonl")
    scores = {name: round(figure, 3) for name, figure in log[-1].items() if name not in ("step", "seconds")}
    totals = {line["step"] + 1: round(line["total"], 1) for line in log if "total" in line}
    return {"scores": scores} | ({"totals": totals} if totals else {})


def make_stage(name: str, args: argparse.Namespace, device: torch.device) -> Stage:
    """A stage with the models of the earlier ones, as they lie in the run's folder."""
    changes = {key: value for key in ("steps", "batch") if (value := getattr(args, key)) is not None}
    if name == "vae":
        return VaeStage(VaeOptions(**changes), device)
    if name == "text":
        return TextStage(TextOptions(**changes), device)
    if name == "reward":
        shown = {} if args.shown is None else {"shown": args.shown}
        return RewardStage(RewardOptions(**changes, **shown), device)
    run: Path = args.run
    if name == "decoder":
        return DecoderStage(DecoderOptions(**changes), load_sprite_vae(run).to(device))
    clips, text, vae = Clips.read(run / "clips"), load_sprite_text(run).to(device), load_sprite_vae(run).to(device)
    if args.shown is not None:
        changes["shown"] = args.shown
    tried = device.type == "cpu" or name in ("teacher", "longer")  # elsewhere passes are replayed as they are
    changes["compiled"] = args.compile and tried
    if name == "teacher":
        return TeacherStage(TeacherOptions(**changes), clips, text, vae, device)
    teacher = load_sprite_network("teacher", run, device)
    if name == "longer":
        return TeacherStage(LongerOptions(**changes), clips, text, vae, device, teacher)
    if name in ("init", SMALL):
        options = SmallInitOptions(**changes) if name == SMALL else InitOptions(**changes)
        return CausalInitStage(options, teacher, clips, text, vae)
    student = load_sprite_network("student", run, device)
    return DistilStage(DistilOptions(**changes), student, teacher, clips, text, vae)
