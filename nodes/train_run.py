"""Run a training inside a node: build its stage, train, read its losses."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..refiner.train import SHEET_PROMPTS, hold_out
from ..refiner.training.dmd_objective import DmdObjective
from ..refiner.training.log import read_rows
from ..refiner.training.loop import LoopOptions, Watch, train
from ..refiner.training.objective import Objective
from ..refiner.training.options import RefineOptions
from ..refiner.training.refiner_stage import RefinerStage
from ..refiner.training.reward_objective import RewardObjective
from ..refiner.training.rewards.reward import Mixture
from ..refiner.training.sheets import Sheets
from ..refiner.wan.vae import WanVAE
from .api import host
from .train_plan import TrainRequest


@dataclass(frozen=True, slots=True)
class Contexts:
    """Encoded prompts by text or number, each [1, L, text_dim] on the CPU."""

    known: Mapping[str, Tensor]
    device: torch.device

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Batch prompts to [B, L, text_dim] on the device, shorter ones padded with zeros."""
        longest = max(context.shape[1] for context in self.known.values())
        contexts = [self.known[prompt] for prompt in prompts]
        padded = [F.pad(context, (0, 0, 0, longest - context.shape[1])) for context in contexts]
        return torch.cat(padded).to(self.device)


def encoded(request: TrainRequest, device: torch.device) -> tuple[list[str], Contexts]:
    """Encode the prompts to train on, and the empty prompt "" where something encodes it."""
    known = {
        line: host.encode_prompt(request.clip, line) for line in dict.fromkeys(request.lines())
    }
    entries = [entry for conditioning in request.positive for entry in conditioning]
    known |= {f"positive {number}": entry[0].float().cpu() for number, entry in enumerate(entries)}
    prompts = list(known)
    known[""] = request.negative[0][0].float().cpu() if request.negative else None
    if known[""] is None and request.clip is not None:
        known[""] = host.encode_prompt(request.clip, "")
    clones = {name: context.clone() for name, context in known.items() if context is not None}
    return prompts, Contexts(clones, device)


def no_sheets(*_: object) -> dict[str, float]:
    """The `show` of a stage that cannot decode: no sheet, and so no scores."""
    return {}


@contextmanager
def stage_of(request: TrainRequest, options: RefineOptions) -> Iterator[RefinerStage]:
    """Build the stage from copies of the models, without inference tensors.

    A reward's models are shared, not copied: they are on the device until the stage is left.
    """
    base = host.own_network(request.model)
    device = next(base.model.parameters()).device
    prompts, contexts = encoded(request, device)
    vae = host.own_vae(request.vae) if request.vae is not None else None
    show = Sheets(base, contexts, vae, prompts[:SHEET_PROMPTS]) if vae is not None else no_sheets
    is_reward = options.objective == "reward"
    with request.reward.on(device) if is_reward else nullcontext() as rewards:
        objective = make_objective(request, options, contexts, vae, rewards)
        trained, unseen = hold_out(prompts)
        yield RefinerStage(options, base, objective, trained, contexts, show, unseen)


def make_objective(
    request: TrainRequest,
    options: RefineOptions,
    contexts: Contexts,
    vae: WanVAE | None,
    rewards: Mixture | None,
) -> Objective:
    """Train for the rewards, or without them for the teacher's distribution."""
    if rewards is not None:
        return RewardObjective(options, rewards, vae)
    return DmdObjective(options, host.own_network(request.teacher), contexts)


def run_stage(stage: RefinerStage, folder: Path, request: TrainRequest, watch: Watch) -> None:
    """Train to the last step, resuming from the run's state."""
    options = LoopOptions(folder, request.steps, request.save_every, request.preview_every)
    train(stage, options, watch)


def loss_map(folder: Path) -> dict[str, list[float]]:
    """The run's losses, in the format of ComfyUI's own trainer."""
    return {"loss": [row["loss"] for row in read_rows(folder / "log.jsonl") if "loss" in row]}
