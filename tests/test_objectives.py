"""Refiner objectives: rewards and their penalty, distribution matching, and accumulation."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import PRESETS, make_level
from autorefiner.refiner.training import dmd_objective, precision
from autorefiner.refiner.training.learner import Learner
from autorefiner.refiner.training.objective import Means
from autorefiner.refiner.training.options import RefineOptions
from autorefiner.refiner.training.refiner_stage import RefinerStage
from autorefiner.refiner.training.residuals import Residuals, describe, normal_distance
from autorefiner.refiner.training.rewards.reward import FrameDraw, Mixture
from autorefiner.refiner.training.self_rollout import self_rollout

from tiny import tiny_network
from tiny_reward import Brightness
from tiny_stage import PROMPTS, REWARD, SMALL, encode, objective_of, stage_of

pytest.importorskip("peft")


def test_the_penalty_is_half_the_mean_square_a_chunk() -> None:
    residuals, level = Residuals(), make_level(750, 5.0, True)
    noise = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    # What has no graph is measured, not penalised.
    for size, graph in ((0.2, True), (0.4, True), (3.0, False)):
        frames = 3 if size < 0.3 else 1
        residual = torch.full((1, 16, frames, 8, 8), size, requires_grad=graph)
        residuals(noise[:, :, :frames], residual, level)
    assert residuals.penalty(noise.device).item() == pytest.approx(
        (0.5 * 0.2**2 + 0.5 * 0.4**2) / 2
    )
    figures = residuals.figures()
    assert set(figures) == {f"{name} 750" for name in ("rms", "constant", "shrink", "distance")}
    assert figures["rms 750"].item() == pytest.approx((0.2 + 0.4 + 3) / 3)
    shifted = Residuals()
    shifted(noise, torch.full_like(noise, -3.0), level)
    figures = shifted.figures()
    assert figures["rms 750"].item() == pytest.approx(3)
    assert figures["distance 750"].item() == pytest.approx(0.5 * 3**2, rel=0.05)
    assert Residuals().penalty(noise.device).item() == 0
    assert Residuals().figures() == {}


def test_figures_of_a_residual_by_hand() -> None:
    """A constant per channel is measured as is; noise shrunk by c has mean Δ · ε of −c E ε²."""
    noise = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sign = torch.tensor([1.0, -1.0]).repeat(8)[:, None, None, None].expand_as(noise)
    constant = describe(noise, 0.3 * sign)
    assert constant["constant"].item() == pytest.approx(0.3)
    assert constant["rms"].item() == pytest.approx(0.3)
    shrunk = describe(noise, -0.2 * noise)
    assert shrunk["shrink"].item() == pytest.approx(-0.2 * noise.square().mean().item(), rel=1e-5)
    assert shrunk["constant"].item() < 0.02
    assert shrunk["rms"].item() == pytest.approx(
        0.2 * noise.square().mean().sqrt().item(), rel=1e-5
    )


def test_the_distance_of_white_noise_is_none_and_that_of_a_shift_is_its_penalty() -> None:
    noise = torch.randn(4, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert normal_distance(noise) < 5e-4
    assert normal_distance(noise + 0.3).item() == pytest.approx(0.5 * 0.3**2, rel=0.05)
    assert normal_distance(1.5 * noise).item() == pytest.approx(
        0.5 * (1.5**2 - 1) - 0.4055, rel=0.05
    )
    # Shifts each channel, not the mean.
    sign = torch.tensor([1.0, -1.0]).repeat(8)[:, None, None, None]
    assert normal_distance(noise + 0.3 * sign).item() == pytest.approx(0.5 * 0.3**2, rel=0.05)


@pytest.mark.parametrize("cache", ["pending", "joint"])
def test_rewards_lead_to_every_factor_and_to_nothing_else(cache) -> None:
    stage = stage_of(replace(REWARD, previous=cache))
    for index in range(3):
        logged = stage.step(index)
    assert logged["loss"] == pytest.approx(logged["l2"] - logged["reward"])
    assert logged["reward"] == pytest.approx(2 * logged["brightness"])
    assert {"rms 750", "distance 750"} <= set(logged)
    assert all(factor.grad.any() for factor in stage.factors.values())
    frozen = [*stage.base.model.parameters(), *stage.objective.vae.parameters()]
    assert all(parameter.grad is None for parameter in frozen)


def test_the_penalty_counts_by_its_weight() -> None:
    stage = stage_of(replace(REWARD, l2=0.3))
    with torch.no_grad():
        for factor in stage.factors.values():
            factor.add_(0.1)
    logged = stage.step(0)
    assert logged["l2"] > 1e-3
    assert logged["loss"] == pytest.approx(0.3 * logged["l2"] - logged["reward"], rel=1e-5)


def test_the_critic_takes_a_step_of_its_own_rate_and_decay() -> None:
    """AdamW's first step: decay by rate · 0.01, then rate · sign(gradient); β1 = 0, β2 = 0.999."""
    stage = stage_of(replace(SMALL, critic_rate=2e-3))
    critic = stage.objective.critic
    before = {name: one.detach().clone() for name, one in critic.model.named_parameters()}
    stage.step(0)
    (group,) = critic.optimizer.adamw.param_groups
    assert group["betas"] == (0.0, 0.999)
    (own,) = stage.learner.optimizer.adamw.param_groups
    assert (own["betas"], own["weight_decay"], own["lr"]) == (
        (0.9, 0.999),
        0.0,
        SMALL.learning_rate,
    )
    for name, parameter in critic.model.named_parameters():
        clear = parameter.grad.abs() > 1e-4  # beside Adam's epsilon of 1e-8
        expected = before[name] * (1 - 2e-3 * 0.01) - 2e-3 * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach()[clear], expected[clear], atol=1e-6, rtol=1e-5)
    assert critic.average is critic.model


def test_the_critic_begins_as_the_teacher_and_the_teacher_stays() -> None:
    objective = objective_of(SMALL)
    teacher = {
        name: one.detach().clone() for name, one in objective.teacher.model.named_parameters()
    }
    assert all(
        torch.equal(one, teacher[name]) for name, one in objective.fake.model.named_parameters()
    )
    stage = RefinerStage(SMALL, tiny_network(), objective, PROMPTS, encode, lambda *_: {})
    stage.step(0)
    assert all(
        torch.equal(one, teacher[name]) for name, one in objective.teacher.model.named_parameters()
    )
    assert any(
        not torch.equal(one, teacher[name]) for name, one in objective.fake.model.named_parameters()
    )


@pytest.mark.parametrize("method", ["autorefiner", "init-noise", "lora"])
def test_the_reward_rises_and_only_a_refiner_pays_for_it(method) -> None:
    """One chunk with every frame scored: only the direct gradient changes the reward."""
    options = replace(REWARD, method=method, frames=3, levels=(750,), learning_rate=3e-3, l2=0.1)
    stage = stage_of(options, Mixture(((Brightness(frames=FrameDraw(9)), 2.0),)))
    logged = [stage.step(0) for _ in range(5)]  # the same prompts and noise
    assert logged[-1]["reward"] > logged[0]["reward"]
    assert logged[0]["l2"] == 0
    assert (logged[-1]["l2"] > 0) == (method != "lora")


def test_a_reward_outside_of_its_range_stops_the_training() -> None:
    wrong = Mixture(((Brightness(), 1.0), (Brightness("wild", 9.0), 0.0)))
    with pytest.raises(ValueError, match="reward wild gave"):
        stage_of(REWARD, wrong).step(0)


@pytest.mark.parametrize("objective", ["dmd", "reward"])
@pytest.mark.parametrize("method", ["autorefiner", "lora"])
def test_accumulated_parts_are_one_batch(objective, method) -> None:
    whole = stage_of(replace(SMALL, objective=objective, method=method, batch=4))
    parts = stage_of(replace(SMALL, objective=objective, method=method, batch=2, accumulation=2))
    for index in range(2):
        left, right = whole.step(index), parts.step(index)
        assert left.keys() == right.keys()
        for name in left:
            # These are figures of all noises together, not means.
            if not name.startswith(("distance", "rms", "constant")):
                assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), name
    for name, factor in whole.factors.items():
        assert torch.allclose(factor.grad, parts.factors[name].grad, rtol=1e-3, atol=1e-6), name
    if objective == "dmd":
        pairs = zip(
            whole.objective.fake.model.parameters(),
            parts.objective.fake.model.parameters(),
            strict=True,
        )
        assert all(
            torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5) for one, other in pairs
        )
        norm = (
            sum(one.grad.square().sum() for one in whole.objective.fake.model.parameters()) ** 0.5
        )
        assert norm < 9, "a gradient that is cut to a norm of 10 would hide a factor"


def test_a_score_is_the_mean_over_its_draws() -> None:
    stage = stage_of(replace(SMALL, score_draws=3))
    (part,) = stage._micro_batches(0, use=1)
    (clean,) = stage._clips(part.path, part.context, part.exit_level)
    (nothing, noise, sigma), _ = stage.objective.loss_arguments(part)
    assert noise.shape == (3, *clean.shape)
    assert len({*sigma.flatten().tolist()}) > 3
    whole = stage.objective._gradient(clean, part.context, nothing, noise, sigma)
    single = [
        stage.objective._gradient(clean, part.context, nothing, noise[i : i + 1], sigma[i : i + 1])
        for i in range(3)
    ]
    torch.testing.assert_close(whole, sum(single) / 3)
    losses = [
        stage.objective._critic_loss(clean, n[None], s[None], part.context, 1.0)[1]
        for n, s in zip(noise, sigma, strict=True)
    ]
    mean = stage.objective._critic_loss(clean, noise, sigma, part.context, 1.0)[1]
    torch.testing.assert_close(mean, torch.stack(losses).mean())


def test_an_improvement_is_how_much_less_the_real_network_changes(monkeypatch) -> None:
    """If the real network predicts x / 4, a clip changes by 3/4 |x|, whatever the fake predicts."""
    objective = stage_of(replace(SMALL, score_draws=2)).objective
    noise = torch.zeros(2, 2, 16, 3, 4, 4)
    objective.loss_arguments = lambda part: ((encode(["", ""]), noise, torch.ones(2, 2)), {})
    objective.fake.model.head.head.bias.data.fill_(float("nan"))
    monkeypatch.setattr(dmd_objective, "real_prediction", lambda clean, *_: clean / 4)
    before, after = (
        torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    found = objective.improvement(before, after, SimpleNamespace(context=encode(["a", "bb"])))
    assert found == pytest.approx(
        0.75 * (before.abs().mean() - after.abs().mean()).item(), rel=1e-4
    )


def test_an_improvement_of_rewards_is_their_difference() -> None:
    objective = stage_of(REWARD).objective
    part = SimpleNamespace(prompts=("a", "bb"), use=3)
    before, after = (torch.full((2, 16, 4, 4, 4), value) for value in (0.0, 0.5))
    brightness = []
    for clips in (before, after):
        pixels = ((objective.vae.decode(clips) + 1) / 2).clamp(0, 1)
        brightness.append(pixels[:, :, 1:].mean().item())
    found = objective.improvement(before, after, part)
    assert found == pytest.approx(2 * (brightness[1] - brightness[0]), abs=0.05)
    assert objective.improvement(after, before, part) == pytest.approx(-found)


def test_checkpointing_gives_the_same_losses() -> None:
    plain, saving = (stage_of(replace(REWARD, checkpointing=each)) for each in (False, True))
    for index in range(2):
        assert plain.step(index)["loss"] == pytest.approx(saving.step(index)["loss"], rel=1e-5)
    assert saving.base.checkpointing
    assert saving.tree.checkpointing


def test_precision_is_that_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that is taken to multiply in bf16."""
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: True)
    seen: list[torch.dtype] = []

    class Told(Brightness):
        def __call__(self, frames: Tensor, numbers, prompts) -> Tensor:
            seen.append(frames.dtype)
            return super().__call__(frames, numbers, prompts)

    for asked in ("fp32", "bf16"):
        stage_of(replace(REWARD, precision=asked), Mixture(((Told(), 1.0),))).step(0)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("objective", ["dmd", "reward"])
def test_nothing_of_a_step_is_retained(objective) -> None:
    stage, alive = stage_of(replace(SMALL, objective=objective, frames=3)), []
    for index in range(8):
        stage.step(index)
        if index in (2, 7):
            gc.collect()
            alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert alive[0] == alive[1]


def test_the_clips_of_a_step_are_made_as_they_are_asked_for() -> None:
    """Rewards learn nothing before a step, so no rollout is sampled for it."""
    stage = stage_of(REWARD)

    def none() -> Iterator:
        raise AssertionError("a rollout was made")
        yield

    assert stage.objective.prepare(0, none()) == {}


def test_means_of_parts() -> None:
    means = Means()
    for value, weight in ((1.0, 0.25), (3.0, 0.75)):
        means.add({"loss": torch.tensor(value)}, weight)
    assert means.floats() == {"loss": 2.5}
    assert Means().floats() == {}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(objective="magic"), "'magic'"),
        (dict(precision="fp8"), "'fp8'"),
        (dict(accumulation=0), "accumulation 0"),
        (dict(l2=-1.0), "penalty"),
    ],
)
def test_options_that_mean_nothing_are_refused(wrong, said) -> None:
    with pytest.raises(ValueError, match=said):
        RefineOptions(**wrong)


def test_options_are_the_documented_ones_by_default() -> None:
    options = RefineOptions()
    assert (options.rank, options.start, options.l2, options.guidance) == (64, "head", 0.03, 3.0)
    assert (options.learning_rate, options.betas, options.ema, options.warmup) == (
        1e-3,
        (0.9, 0.999),
        0.999,
        0.05,
    )
    assert (options.ratio, options.critic_warmup, options.score_draws) == (2, 150, 1)
    assert options.batch * options.accumulation == 64
    assert (options.levels, options.history, options.previous) == (
        (750, 500, 250),
        "shared",
        "pending",
    )
    for method in ("autorefiner", "init-noise", "lora"):
        assert replace(options, method=method).exits == [1, 2, 3]


def test_the_guidance_of_the_real_score_is_that_of_the_options() -> None:
    gradients = [
        stage_of(replace(SMALL, guidance=guidance)).step(0)["gradient"]
        for guidance in (0.0, 3.0, 3.0)
    ]
    assert gradients[1] == gradients[2] != gradients[0]


@pytest.mark.parametrize("name", ["self-forcing", "longlive", "krea-14b"])
def test_a_training_sees_the_presets_window_and_positions(name: str) -> None:
    """Beyond the window, its rollouts equal samples of that preset."""
    preset = PRESETS[name]
    options = replace(SMALL, frames=18, preset=preset, levels=preset.levels[1:])
    stage = stage_of(options)
    with torch.no_grad():
        context = encode(PROMPTS[:2])
        rollout = stage.rollout(context, WhiteNoise(3), None)
        made = self_rollout(rollout, exit_level=len(preset.levels) - 1)
        plan = RunPlan(preset, options.frames, options.height, options.width, batch=2)
        sampled = torch.cat(list(sample(stage.base, context, plan, noise=WhiteNoise(3))), dim=2)
    assert torch.allclose(made, sampled, atol=1e-4)


def test_a_score_that_is_no_number_is_no_gradient_of_zero() -> None:
    stage = stage_of(SMALL)
    stage.objective.teacher.model.head.head.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="gradient"):
        stage.step(0)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_gradient_that_is_not_finite_changes_nothing(average: float) -> None:
    layer = torch.nn.Linear(3, 3)
    learner = Learner(layer, 1e-2, average)
    learner.step(layer(torch.ones(1, 3)).sum(), 0, 1.0)
    before = [tensor.clone() for tensor in (*layer.parameters(), *learner.average.parameters())]
    learner.zero_grad()
    layer(torch.ones(1, 3)).sum().backward()
    layer.weight.grad[1, 1] = float("nan")
    with pytest.raises(ValueError, match="gradient"):
        learner.update(1, 1.0)
    after = (*layer.parameters(), *learner.average.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
