"""Training folders damaged between two runs of the same command."""

import random
import shutil
from pathlib import Path

import torch

from autorefiner.nodes.train_plan import steps_taken

from .base import Attempt, as_json, changed, command, damaged, hostile_value
from .pickles import called, instructions

FILES = ("state.pt", "log.jsonl", "run.json", "sheet_000001.png", "lock", "loss.png")


def hostile_state(path: Path, choose: random.Random) -> None:
    """Write a state file that torch can read, with unexpected contents."""
    state = torch.load(path, weights_only=True)
    holder: dict = choose.choice(
        (state, state["stage"], state["stage"].get("factors", state["stage"]))
    )
    key = choose.choice(list(holder))
    value = holder[key]
    holder[key] = choose.choice((hostile_value(choose), torch.zeros(3), {}, {key: value}, [value]))
    torch.save(state, path)


def run_folders(folder: Path, choose: random.Random) -> Attempt:
    """A training folder with one file damaged, replaced or of another kind."""
    run = folder / "run"
    name = choose.choice((*FILES[:3], *FILES))
    path = run / name
    way = choose.randrange(6)
    if way == 0:
        path.unlink(missing_ok=True)
        choose.choice(
            (
                path.mkdir,
                lambda: path.symlink_to("/dev/zero"),
                lambda: path.symlink_to(path),
                path.touch,
            )
        )()
    elif way == 1 and name == "state.pt":
        hostile_state(path, choose)
    elif way == 2 and name == "state.pt":
        path.write_bytes(choose.choice((called, instructions))(choose))
    elif way == 3 and name == "run.json":
        path.write_bytes(
            as_json(changed({"steps": 2, "rank": 2, "prompts": "x", "base": "y"}, choose))
        )
    elif way == 4:
        path.write_bytes(
            choose.choice((b"", b"\0" * 999, b"[" * 99_999, b'{"step": 0}\n' * 99, b"\xff" * 99))
        )
    elif path.exists():
        path.write_bytes(damaged(path.read_bytes(), choose))
    if choose.random() < 0.1:
        shutil.rmtree(run)
        run.touch()
    acts = (command("train", folder / "run.toml", "--device", "cpu"), lambda: steps_taken(run))
    return Attempt(f"run folder {name}", choose.choice((*acts, acts[0])))
