"""A training inside a node: its stage and its losses."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..refiner.train import SHEET_PROMPTS, Sheets, hold_out
from ..refiner.training.dmd_objective import DmdObjective
from ..refiner.training.log import read_rows
from ..refiner.training.loop import LoopOptions, Watch, train
from ..refiner.training.objective import Objective
from ..refiner.training.options import RefineOptions
from ..refiner.training.refine import RefineStage
from ..refiner.training.reward_objective import RewardObjective
from ..refiner.training.rewards.reward import Mixture
from ..refiner.wan.vae import WanVAE
from .api import host
from .train_plan import Asked


@dataclass(frozen=True, slots=True)
class Contexts:
    """Prompts as the networks read them, each encoded once: [1, L, text_dim] on the CPU."""

    known: Mapping[str, Tensor]
    device: torch.device

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, text_dim] on the device, with zeros behind the shorter ones."""
        longest = max(context.shape[1] for context in self.known.values())
        found = (self.known[prompt] for prompt in prompts)
        return torch.cat([F.pad(one, (0, 0, 0, longest - one.shape[1])) for one in found]).to(self.device)


def encoded(asked: Asked, device: torch.device) -> tuple[list[str], Contexts]:
    """The prompts to train on, by text or by number, and their contexts; "" is no prompt."""
    known = {line: host.encode_prompt(asked.clip, line) for line in dict.fromkeys(asked.lines())}
    entries = [entry for conditioning in asked.positive for entry in conditioning]
    known |= {f"positive {number}": entry[0].float().cpu() for number, entry in enumerate(entries)}
    prompts = list(known)
    known[""] = asked.negative[0][0].float().cpu() if asked.negative else None
    if known[""] is None and asked.clip is not None:
        known[""] = host.encode_prompt(asked.clip, "")
    return prompts, Contexts({name: context.clone() for name, context in known.items() if context is not None}, device)


@contextmanager
def stage_of(asked: Asked, options: RefineOptions) -> Iterator[RefineStage]:
    """Everything that the training needs, in copies of its own; no inference tensor is among them.

    A reward's models, which others share, are on the device until the stage is left.
    """
    base = host.own_network(asked.model)
    device = next(base.model.parameters()).device
    prompts, contexts = encoded(asked, device)
    vae = host.own_vae(asked.vae) if asked.vae is not None else None
    show = Sheets(base, contexts, vae, prompts[:SHEET_PROMPTS]) if vae is not None else lambda *_: {}
    with asked.reward.on(device) if options.objective == "reward" else nullcontext() as rewards:
        objective = make_objective(asked, options, contexts, vae, rewards)
        trained, unseen = hold_out(prompts)
        yield RefineStage(options, base, objective, trained, contexts, show, unseen)


def make_objective(
    asked: Asked, options: RefineOptions, contexts: Contexts, vae: WanVAE | None, rewards: Mixture | None
) -> Objective:
    """What it trains for: the rewards, or without them the teacher's videos."""
    if rewards is not None:
        return RewardObjective(options, rewards, vae)
    return DmdObjective(options, host.own_network(asked.teacher), contexts)


def run_stage(stage: RefineStage, folder: Path, asked: Asked, watch: Watch) -> None:
    """Train to the end, from where the run stands."""
    train(stage, LoopOptions(folder, asked.steps, asked.save_every, asked.preview_every), watch)


def loss_map(folder: Path) -> dict[str, list[float]]:
    """The run's losses, as ComfyUI's own trainer gives them."""
    return {"loss": [row["loss"] for row in read_rows(folder / "log.jsonl") if "loss" in row]}
