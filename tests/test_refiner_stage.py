"""The refiner's stage: which steps update it and how much, its clips, and its saved state."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autorefiner.refiner.noise.refiner import HEAD
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.training.adapters import pairs_of
from autorefiner.refiner.training.residuals import Residuals
from autorefiner.refiner.training.self_rollout import self_rollout

from tiny_stage import PROMPTS, REWARD, SMALL, encode, stage_of

pytest.importorskip("peft")


def test_the_critic_warms_up_alone_for_a_quarter_of_the_steps_at_most() -> None:
    options = replace(SMALL, ratio=2, steps=12, critic_warmup=100)
    assert (options.first_update, options.updates) == (3, 5)
    stage = stage_of(options)
    logged = [stage.step(index) for index in range(6)]
    assert ["gradient" in row for row in logged] == [False, False, False, True, False, True]
    assert all("loss" in row for row in logged)
    assert replace(options, critic_warmup=2).first_update == 2
    reward = replace(REWARD, critic_warmup=100, ratio=5)  # rewards have neither
    assert (reward.first_update, reward.updates) == (0, 8)


def test_the_rate_rises_over_a_share_of_the_updates_and_falls_to_0() -> None:
    options = replace(REWARD, steps=101, warmup=0.1)  # 10 updates
    factors = [options.rate_factor(update) for update in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 4 / 101)))
    assert factors[50] == pytest.approx(0.5 * (1 + math.cos(math.pi * 50 / 101)))
    assert options.rate_factor(101) == pytest.approx(0)
    assert replace(options, warmup=0.0).rate_factor(0) == 1
    stage = stage_of(replace(REWARD, steps=4, learning_rate=1e-2, warmup=0.5))
    before = {name: factor.detach().clone() for name, factor in stage.factors.items()}
    stage.step(0)
    (group,) = stage.learner.optimizer.adamw.param_groups
    assert group["lr"] == pytest.approx(1e-2 * 0.5)
    assert any(not torch.equal(factor, before[name]) for name, factor in stage.factors.items())


def test_a_stage_starts_at_its_share_of_the_bases_flow() -> None:
    for share in (0.03, 0.2):
        stage = stage_of(replace(SMALL, start="flow", flow_share=share))
        assert torch.equal(pairs_of(stage.tree)[HEAD].up, -share * torch.eye(64))


def test_antithetic_clips_share_a_prompt_and_the_size_of_their_noise() -> None:
    pairs = stage_of(replace(SMALL, batch=4, accumulation=2, antithetic=True))
    parts = list(pairs._micro_batches(0, use=1))
    for part in parts:
        assert part.prompts[::2] == part.prompts[1::2]
        assert torch.equal(part.path[:, ::2], -part.path[:, 1::2])
    assert not torch.equal(parts[0].path, parts[1].path)
    whole = stage_of(replace(SMALL, batch=8, antithetic=True))
    (one,) = whole._micro_batches(0, use=1)
    assert one.prompts == parts[0].prompts + parts[1].prompts
    assert torch.equal(one.path, torch.cat([part.path for part in parts], dim=1))
    with pytest.raises(ValueError, match="even"):
        replace(SMALL, batch=3, antithetic=True)
    # None of the held-out clips has an antithetic pair.
    odd = stage_of(replace(SMALL, antithetic=True), held_out=["one", "two", "three"])
    assert odd.compare() == {"held-out": pytest.approx(0, abs=1e-6)}


@pytest.mark.parametrize("options", [SMALL, REWARD], ids=["dmd", "reward"])
@pytest.mark.parametrize("method", ["autorefiner", "lora"])
def test_held_out_clips_are_compared_with_the_bases(options, method) -> None:
    """A fresh refiner equals the base; rewards are the difference between two rollouts."""
    stage = stage_of(replace(options, method=method), held_out=["held", "out"])
    assert stage.compare() == {"held-out": pytest.approx(0, abs=1e-6)}
    with torch.no_grad():
        for factor in stage.factors.values():
            factor.add_(0.05)
    found = stage.compare()["held-out"]
    assert found != 0
    seen = Residuals()
    assert stage.compare(seen) == {"held-out": found}
    levels = {name.split()[1] for name in seen.figures()}
    assert levels == ({"750", "500", "250"} if method == "autorefiner" else set())
    assert stage.show(Path(), 1) == {"held-out": found}
    assert stage_of(options).show(Path(), 1) == {}


def test_critic_and_refiner_see_clips_of_their_own() -> None:
    stage = stage_of(replace(SMALL, batch=8))
    (critic,), (refiner,) = (list(stage._micro_batches(0, use)) for use in (0, 1))
    assert critic.prompts != refiner.prompts
    assert not any(
        torch.equal(*pair)
        for pair in zip(critic.path.unbind(1), refiner.path.unbind(1), strict=True)
    )
    seen: list[int] = []
    parts = stage._micro_batches
    stage._micro_batches = lambda index, use: seen.append(use) or parts(index, use)
    stage.step(0)
    assert seen == [0, 1]


@pytest.mark.parametrize("method", ["autorefiner", "init-noise", "lora"])
def test_clips_end_at_every_refined_level_in_turn(method: str) -> None:
    stage = stage_of(replace(SMALL, method=method))
    ends = {
        use: [part.exit_level for index in range(30) for part in stage._micro_batches(index, use)]
        for use in (0, 1)
    }
    assert {*ends[0]} == {*ends[1]} == {*stage.options.exits} == {1, 2, 3}
    assert ends[0] != ends[1]


def test_what_is_kept_of_a_training_is_the_average() -> None:
    stage = stage_of(SMALL)
    for index in range(3):
        stage.step(index)
    average = dict(zip(stage.factors, stage.learner.average.parameters(), strict=True))
    for name, pair in stage.average().items():
        assert torch.equal(pair.up, average[f"{name}.lora_B.default.weight"])
        assert not torch.equal(pair.up, stage.factors[f"{name}.lora_B.default.weight"])


def test_the_refiner_learns_at_every_ratio_th_step_alone() -> None:
    """Its average counts its own updates: the decay after the second one is 2/9."""
    stage = stage_of(replace(SMALL, ratio=2))
    for index, learns in enumerate((True, False, True)):
        before = {name: factor.detach().clone() for name, factor in stage.factors.items()}
        averages = [average.clone() for average in stage.learner.average.parameters()]
        logged = stage.step(index)
        assert ("gradient" in logged) == learns
        assert (
            any(not torch.equal(factor, before[name]) for name, factor in stage.factors.items())
            == learns
        )
    keep = 2 / 9
    for old, new, factor in zip(
        averages, stage.learner.average.parameters(), stage.factors.values(), strict=True
    ):
        torch.testing.assert_close(new, keep * old + (1 - keep) * factor.detach())


@pytest.mark.parametrize(
    ("method", "levels", "refined"),
    [
        ("autorefiner", (500,), {"rms 500"}),
        ("init-noise", (750, 500), {"rms 1000"}),
        ("lora", (750, 500), set()),
    ],
)
def test_a_training_refines_the_levels_of_its_method_alone(method, levels, refined) -> None:
    logged = stage_of(replace(SMALL, method=method, levels=levels)).step(0)
    assert {name for name in logged if name.startswith("rms")} == refined


def test_a_fresh_lora_is_the_base_and_its_head_speaks() -> None:
    stage = stage_of(replace(SMALL, method="lora"))
    with torch.no_grad():
        context = encode(PROMPTS[:2])
        made = self_rollout(stage.rollout(context, WhiteNoise(3), stage.refiner()), exit_level=3)
        plan = RunPlan(SMALL.preset, SMALL.frames, SMALL.height, SMALL.width, batch=2)
        sampled = torch.cat(list(sample(stage.base, context, plan, noise=WhiteNoise(3))), dim=2)
    torch.testing.assert_close(made, sampled, atol=1e-5, rtol=1e-5)
