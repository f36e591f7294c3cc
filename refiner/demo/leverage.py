"""Measure which noises can move a clip, by training for one latent channel's mean.

AutoRefiner, section 3.3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from textwrap import fill

import torch
from torch import Tensor
from tqdm import trange

from ..training.objective import MicroBatch
from ..training.options import RefineOptions
from ..training.refiner_stage import RefinerStage
from ..training.residuals import Residuals
from .bundle import load_sprite_network, load_sprite_text
from .clips import held_out
from .metrics.table import aligned
from .world import sample_scene

METHODS = {"autorefiner": "AutoRefiner", "init-noise": "InitNoiseRefiner", "lora": "LoRA"}
PROMPTS, HELD_OUT = 1024, 16


@dataclass(frozen=True, slots=True)
class LeverageOptions:
    """The length of each method's training."""

    updates: int = 60
    batch: int = 4
    frames: int = 9  # latent

    @property
    def training(self) -> RefineOptions:
        """A training without a penalty, which would limit the noise."""
        return RefineOptions(
            objective="reward", steps=self.updates, batch=self.batch, accumulation=1,
            frames=self.frames, rank=32, l2=0.0, shown=1,
        )  # fmt: skip


class ChannelMean:
    """An objective whose reward is the mean of the first latent channel."""

    ratio, learners = 1, ()

    def prepare(self, index: int, samples: Iterator[tuple[MicroBatch, Tensor]]) -> dict[str, float]:
        """Do nothing: there are no networks to train."""
        return {}

    def loss_arguments(self, batch: MicroBatch) -> tuple[tuple, dict]:
        return (), {}

    def loss(
        self, clean: Tensor, context: Tensor, residuals: Residuals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        reward = clean[:, 0].float().mean()
        return -reward, {"loss": -reward, "reward": reward}

    def improvement(self, before: Tensor, after: Tensor, batch: MicroBatch) -> float:
        return (after[:, 0] - before[:, 0]).mean().item()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def leverage(options: LeverageOptions, device: torch.device) -> str:
    """Train the bundled student by each method; returns the table in Markdown."""
    network, text = load_sprite_network("student", device=device), load_sprite_text().to(device)
    prompts = [sample_scene(seed).caption.text for seed in range(PROMPTS)]
    unseen = [caption.text for caption in held_out(HELD_OUT)]
    rows = [["method", "held-out reward", "rms Δ by level"]]
    for method, name in METHODS.items():
        training = replace(options.training, method=method)
        stage = RefinerStage(training, network, ChannelMean(), prompts, text, lambda *_: {}, unseen)
        for index in trange(options.updates, desc=name, unit="update", dynamic_ncols=True):
            stage.step(index)
        residuals = Residuals()
        gain = stage.compare(residuals)["held-out"]
        sizes = {
            level: figure
            for key, figure in residuals.figures().items()
            for kind, level in [key.split()]
            if kind == "rms"
        }
        cells = ", ".join(f"{level}: {figure:.2f}" for level, figure in sizes.items())
        rows.append([name, f"{gain:+.2f}", cells or "–"])
    text_above = (
        f"The gain of the mean of the first latent channel on {HELD_OUT} held-out captions, with"
        f" the same noise, after {options.updates} updates of {options.batch} clips"
        " (`autorefiner demo leverage`)."
    )
    return f"{fill(text_above, 120)}\n\n{aligned(rows)}"
