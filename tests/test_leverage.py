"""A coherent reward moves the path's noises and not the initial one (AutoRefiner, section 3.3)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.training.objective import Part
from autorefiner.refiner.training.options import RefineOptions
from autorefiner.refiner.training.refine import RefineStage
from autorefiner.refiner.training.residuals import Residuals

from tiny import TINY, tiny_network

pytest.importorskip("peft")

OPTIONS = RefineOptions(
    objective="reward", rank=32, steps=24, batch=4, accumulation=1, frames=9, height=4, width=4, learning_rate=1e-3,
    l2=0.0, precision="fp32",
)  # fmt: skip
PROMPTS = [f"prompt {number}" for number in range(64)]


class ChannelMean:
    """The reward is the mean of the first latent channel."""

    ratio, learners = 1, ()

    def prepare(self, index: int, samples: object) -> dict[str, float]:
        return {}

    def given(self, part: Part) -> tuple[tuple, dict]:
        return (), {}

    def loss(self, clean: Tensor, context: Tensor, residuals: Residuals) -> tuple[Tensor, dict[str, Tensor]]:
        reward = clean[:, 0].mean()
        return -reward, {"loss": -reward, "reward": reward}

    def improvement(self, before: Tensor, after: Tensor, part: Part) -> float:
        return (after[:, 0] - before[:, 0]).mean().item()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def encode(prompts: list[str]) -> Tensor:
    generators = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
    return torch.stack([torch.randn(TINY.text_len, TINY.text_dim, generator=one) for one in generators])


@pytest.mark.parametrize(("method", "least", "most"), [("autorefiner", 0.5, 5.0), ("init-noise", 0.0, 0.1)])
def test_24_updates_raise_the_reward_by_the_paths_noises_alone(method: str, least: float, most: float) -> None:
    options = replace(OPTIONS, method=method)
    stage = RefineStage(options, tiny_network(), ChannelMean(), PROMPTS, encode, lambda *_: {}, ["held", "out"])
    assert stage.compare() == {"held-out": 0.0}
    for index in range(options.steps):
        stage.step(index)
    assert least < stage.compare()["held-out"] < most
