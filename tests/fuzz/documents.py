"""Hostile documents: workflows, training TOML, command lines, prompts, and requests of the page."""

import json
import random
from pathlib import Path

from autorefiner.nodes.cache_view import cache_view
from autorefiner.nodes.hosts import standalone
from autorefiner.refiner.train import read_prompts
from autorefiner.refiner.train_config import TrainConfig

from .base import (
    ESCAPES,
    NUMBERS,
    TEXTS,
    Attempt,
    as_json,
    changed,
    command,
    damaged,
    hostile_value,
)

API = Path(__file__).parents[2] / "workflows" / "api"
WORKFLOWS = (
    "quickstart",
    "text_to_video",
    "start_image",
    "extend_a_clip",
    "compare_controls",
    "train_a_refiner",
)
SMALL = {
    "length": 1,
    "width": 64,
    "height": 64,
    "steps": 1,
    "batch_size": 1,
    "captions": 1,
    "batch": 1,
    "accumulation": 1,
}
SMALL_RUN = {
    "steps": 4,
    "batch": 4,
    "accumulation": 4,
    "frames": 9,
    "rank": 64,
    "height": 16,
    "width": 16,
    "score_draws": 2,
}
TRAINING = """\
out = "{run}.refiner.safetensors"
run = "{run}"
base = "sprites"
prompts = "sprites"
preset = "self-forcing"
sampler_levels = [1000, 750, 500]
save_every = 1
show_every = 9
[refiner]
method = "autorefiner"
objective = "dmd"
levels = [750, 500]
steps = {steps}
batch = 2
accumulation = 1
rank = 2
frames = 3
ratio = 1
shown = 1
learning_rate = 1e-3
betas = [0.9, 0.99]
l2 = 0.1
critic_warmup = 0
antithetic = false
"""
OPTIONS = (
    "--model", "--prompt", "--frames", "--size", "--seed", "--extend", "--out", "--lora", "--vae",
    "--context", "--preset", "--levels", "--steps", "--window", "--sink", "--method", "--refiner",
    "--refiner-strength", "--refined-levels", "--device", "--dtype", "--text-encoder",
    "--tokenizer", "--context-cache", "--weights", "--refiner-form", "--sheet", "--fit",
)  # fmt: skip
VIEW = {
    "window": 9, "sink": 0, "positions": "the model's", "history": "as trained",
    "previous_x0": "as trained", "model": {"demo": True},
    "size": {"width": 64, "height": 64, "length": 81, "batch_size": 1}, "refiner": None,
    "schedule": {"levels": "1000,500", "first_levels": "", "refined_levels": "500",
                 "preset": "the model's own", "frames_per_chunk": 3},
}  # fmt: skip


def small(workflow: dict) -> dict:
    """Shrink a workflow so that a run takes a second."""
    for node in workflow.values():
        node["inputs"] |= {name: value for name, value in SMALL.items() if name in node["inputs"]}
    return workflow


def training(run: str, steps: int) -> str:
    """Return a small training configuration for this folder."""
    return TRAINING.format(run=run, steps=steps)


def workflows(folder: Path, choose: random.Random) -> Attempt:
    """A workflow file with a few changed values."""
    name = choose.choice(WORKFLOWS)
    content = as_json(changed(small(json.loads((API / f"{name}.json").read_text())), choose))
    way = choose.randrange(12)
    if way == 0:
        content = damaged(content, choose)
    elif way == 1:
        content = choose.choice(
            (
                b"[" * 50_000,
                b'{"1":' * 3000,
                b"\xff\xfe{}",
                b"{}",
                b"[]",
                b"null",
                b'{"1": {}}',
                b"",
            )
        )
    elif way == 2:
        content = content.decode().encode(
            choose.choice(("utf-16", "utf-16-le", "utf-8-sig", "utf-32"))
        )
    path = folder / "hostile.json"
    path.write_bytes(content)
    sets = (
        ["--set", choose.choice((*TEXTS, "3.seed=7", "3.seed", "=", "99.x=1"))]
        if choose.random() < 0.1
        else []
    )
    sets = [one.replace("\0", "") for one in sets]
    return Attempt(
        f"workflow {name}",
        command("run", path, "--base", folder, "--out", folder / "output", *sets),
    )


def toml_value(value: object) -> str:
    """Return a value as TOML, or something that resembles it."""
    return "inf" if value in NUMBERS[7:9] else json.dumps(value, default=str)


def trainings(folder: Path, choose: random.Random) -> Attempt:
    """A training's TOML with some changed values."""
    lines = training("other run", 1).splitlines()
    for _ in range(choose.choice((1, 1, 2, 4))):
        at = choose.randrange(len(lines))
        name = lines[at].partition(" = ")[0]
        lines[at] = choose.choice((
            f"{name} = {toml_value(hostile_value(choose))}", f"{name} = {choose.choice(NUMBERS)}",
            "", lines[at] + "\n" + lines[at],
            choose.choice(("x", "[[rewards]]", "[refiner.x]", "path"))
            + f" = {toml_value(hostile_value(choose))}",
            "[[rewards]]\nkind = " + toml_value(choose.choice(TEXTS)),
            f"{name} = " + "[" * choose.choice((5, 2000)),
        ))  # fmt: skip
    content = "\n".join(lines).encode(errors="surrogatepass")
    path = folder / "hostile.toml"
    path.write_bytes(damaged(content, choose) if choose.random() < 0.2 else content)

    def act() -> object:
        options = TrainConfig.read(path).refiner
        fast = all(getattr(options, name) <= most for name, most in SMALL_RUN.items())
        return command("train", path, "--device", "cpu")() if fast else None

    return Attempt("training", act)


def arguments(folder: Path, choose: random.Random) -> Attempt:
    """A command line of hostile arguments."""
    values = (
        *TEXTS, *map(str, NUMBERS), str(folder / "model.safetensors"), str(folder), "/dev/zero",
        str(folder / "a.mp4"), "sprites", "1000,750", "750,,", "64x64", "0x0", "99999999x99999999",
        "cuda:99", "a:b:c", ESCAPES,
    )  # fmt: skip
    values = [value for value in values if "secret" not in value]  # users may name any file
    if choose.random() < 0.2:
        given = [
            choose.choice(("inspect", "train", "run", "bench", "demo", "presets")),
            choose.choice(values),
        ]
        given = ["inspect", given[1]] if given[0] in ("bench", "demo") else given
    else:
        given = [
            "generate",
            "--model",
            "sprites",
            "--prompt",
            "a red star",
            "--frames",
            "1",
            "--out",
            str(folder / "a.mp4"),
        ]
        for _ in range(choose.choice((1, 2, 4))):
            given += [choose.choice(OPTIONS), choose.choice(values)]
    given = [one.replace("\0", "").replace("\ud800", "\udcff") for one in given]
    return Attempt("arguments", command(*given))


def prompts(folder: Path, choose: random.Random) -> Attempt:
    """A prompts file in a random encoding, or a prompt of odd characters."""
    text = "\n".join(
        choose.choices((*TEXTS, "a red star circles on a navy ground"), k=choose.choice((1, 5, 50)))
    )
    encoding = choose.choice(
        ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-7")
    )
    path = folder / "prompts.txt"
    path.write_bytes(text.encode(encoding, errors="replace"))
    generate = [
        "generate",
        "--model",
        "sprites",
        "--frames",
        "1",
        "--out",
        folder / "a.mp4",
        "--prompt",
    ]
    prompt = choose.choice(TEXTS).replace("\0", "").replace("\ud800", "\udcff")
    return Attempt(
        "prompts", choose.choice((lambda: read_prompts(str(path)), command(*generate, prompt)))
    )


def posts(folder: Path, choose: random.Random) -> Attempt:
    """A changed request of the page."""
    place = standalone.Place(folder, folder / "output")
    model = {"file": choose.choice(TEXTS), "weights": "auto", "dtype": "auto", "preset": "auto"}
    view = {
        **VIEW,
        "model": choose.choice((VIEW["model"], model)),
        "refiner": choose.choice((None, {"file": "x"})),
    }
    posted = changed(view, choose)

    def act() -> object:
        with standalone.running_at(place):
            return cache_view(posted)

    return Attempt("page", act)
