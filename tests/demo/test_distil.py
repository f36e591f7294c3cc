"""The student's distillation uses the objective of a refiner's training with other noises."""

from itertools import pairwise

import pytest
import torch

from autorefiner.refiner.demo.recipes.data import Clips
from autorefiner.refiner.demo.recipes.student import DistilOptions, DistilStage, distil_prompts
from autorefiner.refiner.demo.text_encoder import SpriteTextEncoder
from autorefiner.refiner.demo.world import sample_scene
from autorefiner.refiner.training import precision
from autorefiner.refiner.training.dmd import critic_loss
from autorefiner.refiner.training.dmd_objective import DmdObjective
from autorefiner.refiner.wan.vae import WanVAE

from tiny import TINY, tiny_network


@pytest.fixture
def stage(monkeypatch) -> DistilStage:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)
    text = SpriteTextEncoder(TINY.text_dim, TINY.text_len).eval().requires_grad_(False)
    captions = [sample_scene(seed).caption for seed in range(3)]
    latents = torch.randn(3, 16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    options = DistilOptions(batch=2, ratio=2, steps=4)
    models = tiny_network(), tiny_network(seed=1)
    return DistilStage(options, *models, Clips(latents, captions), text, WanVAE(4))


def test_the_critic_is_scored_at_the_noises_behind_the_path(stage) -> None:
    prompts, _ = distil_prompts(stage.options, stage.clips, 0)
    batch = stage._batch(0, 0, prompts)
    noise, sigma = (scored[0] for scored in batch.scored_at)
    with torch.no_grad():
        clean = stage._rollout(batch.path, batch.context, batch.exit_level)
        text = stage.objective.fake.text(batch.context)
        expected = critic_loss(stage.objective.fake, clean, noise, sigma, text).item()
    assert isinstance(stage.objective, DmdObjective)
    assert stage.step(0)["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_generator_learns_at_every_second_step(stage) -> None:
    name = "blocks.0.self_attn.v.weight"
    weights = [stage.generator.model.get_parameter(name).detach().clone()]
    logged = []
    for index in range(3):
        logged.append(stage.step(index))
        weights.append(stage.generator.model.get_parameter(name).detach().clone())
    changed = [not torch.equal(before, after) for before, after in pairwise(weights)]
    assert changed == ["generator" in figures for figures in logged] == [True, False, True]
    assert set(stage.state_dict()) == {"generator", "critic"}


def test_a_state_goes_on_as_it_was(stage) -> None:
    stage.step(0)
    other = DistilStage(
        stage.options,
        tiny_network(seed=2),
        tiny_network(seed=3),
        stage.clips,
        stage.text,
        stage.vae,
    )
    other.objective.teacher = stage.objective.teacher
    other.load_state_dict(stage.state_dict())
    assert other.step(1) == pytest.approx(stage.step(1))
