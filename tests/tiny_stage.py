"""Small training stages for tests: refiner stages on the tiny network, and a linear fit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from autorefiner.refiner.training.dmd_objective import DmdObjective
from autorefiner.refiner.training.learner import Learner, LearnerStage
from autorefiner.refiner.training.objective import Objective
from autorefiner.refiner.training.options import RefineOptions
from autorefiner.refiner.training.refiner_stage import RefinerStage
from autorefiner.refiner.training.reward_objective import RewardObjective
from autorefiner.refiner.training.rewards.reward import Mixture

from tiny import TINY, tiny_network
from tiny_reward import Brightness, tiny_vae

PROMPTS = ["a", "bb", "ccc"]
SMALL = RefineOptions(
    rank=2, steps=8, batch=2, accumulation=1, frames=4, height=4, width=4, ratio=1,
    critic_warmup=0, score_draws=1, learning_rate=1e-3, l2=1.0, precision="fp32",
)  # fmt: skip
REWARD = replace(SMALL, objective="reward")
BRIGHT = Mixture(((Brightness(), 2.0),))


def encode(prompts: list[str]) -> Tensor:
    """Return a fixed random context for each prompt, seeded by its length."""
    generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
    return torch.stack(
        [torch.randn(TINY.text_len, TINY.text_dim, generator=one) for one in generators]
    )


def objective_of(options: RefineOptions, rewards: Mixture = BRIGHT) -> Objective:
    if options.objective == "dmd":
        return DmdObjective(options, tiny_network(seed=1), encode)
    return RewardObjective(options, rewards, tiny_vae())


def stage_of(
    options: RefineOptions, rewards: Mixture = BRIGHT, held_out: Sequence[str] = ()
) -> RefinerStage:
    objective = objective_of(options, rewards)
    return RefinerStage(
        options, tiny_network(), objective, PROMPTS, encode, lambda *_: {}, held_out
    )


def nothing(index: int) -> None: ...


class Line(LearnerStage):
    """Fits weights to one; `at` runs before a step, `behind` after it, `drawing` per sheet."""

    def __init__(self, size: int, at=nothing, behind=nothing, drawing=nothing) -> None:
        self.learner = Learner(nn.ParameterList([torch.zeros(size)]), 0.1, 0.0)
        self.at, self.behind, self.drawing = at, behind, drawing

    def step(self, index: int) -> dict[str, float]:
        self.at(index)
        loss = (self.learner.model[0] - 1).square().mean()
        self.learner.step(loss, index, 1.0)
        self.behind(index)
        return {"loss": loss.item()}

    def show(self, folder: Path, index: int) -> dict[str, float]:
        self.drawing(index)
        (folder / f"sheet_{index:06d}.png").touch()
        return {}
