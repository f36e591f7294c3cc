"""Objectives against formulas worked by hand, on linear networks."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from autorefiner.refiner.memory.whole import WholeClip
from autorefiner.refiner.rollout import add_noise, predict_x0
from autorefiner.refiner.training.dmd import (
    DmdOptions,
    critic_loss,
    dmd_gradient,
    dmd_loss,
    draw_sigma,
    shifted,
    whole_flow,
)
from autorefiner.refiner.training.learner import NORMS, Learner, warm_cosine

SHAPE = (2, 3, 2, 2, 2)  # [B, C, F, h, w]
SIGMA = torch.tensor([0.25, 0.8])


class Toy:
    """A network whose flow is a function of the clip and σ [B, 1, 1, 1, 1]; text is a number."""

    def __init__(self, flow: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        self.flow, self.calls = flow, []
        self.model = SimpleNamespace(patch_embedding=SimpleNamespace(weight=torch.zeros(1)))

    def __call__(self, x: Tensor, t: Tensor, text: float, view: WholeClip) -> Tensor:
        self.calls.append((t, view, text))
        return self.flow(x, (t / 1000)[:, :, None, None, None], text)


def linear(weight: float) -> Toy:
    """v = weight · x + text, so x0 = (1 − σ weight) x − σ text."""
    return Toy(lambda x, sigma, text: weight * x + text)


def aiming(target: float | Tensor) -> Toy:
    """The flow whose x0 is the target, whatever the text: v = (x − target) / σ."""
    return Toy(lambda x, sigma, text: (x - target) / sigma)


def draws(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a clip and noise."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, *SHAPE, generator=generator)
    return clean, noise


def wide(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1, 1)


def test_x0_and_noise_by_hand() -> None:
    """x_t = (1 − σ) x0 + σ ε and x0 = x_t − σ v.

    At σ = 0.25, x0 = 2 and ε = −2: x_t = 1 and v = ε − x0 = −4.
    """
    x = add_noise(torch.tensor(2.0), torch.tensor(-2.0), 0.25)
    assert x.item() == 1.0
    assert predict_x0(x, torch.tensor(-4.0), 0.25).item() == 2.0
    assert add_noise(torch.tensor(2.0), torch.tensor(-2.0), 1.0).item() == -2.0
    assert add_noise(torch.tensor(2.0), torch.tensor(-2.0), 0.0).item() == 2.0


def test_x0_is_worked_out_in_double_precision() -> None:
    """Where σ v is close to x_t, fp32 would lose the difference."""
    x, flow = torch.tensor(1e4), torch.tensor(1e4 / 0.7)
    expected = torch.tensor(1e4).double() - 0.7 * torch.tensor(1e4 / 0.7).double()
    assert predict_x0(x, flow, 0.7).item() == expected.float().item()
    assert predict_x0(x, flow, 0.7).dtype == torch.float32


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_dmd_gradient_by_hand(guidance: float) -> None:
    """(x0 of the fake − guided x0 of the real) / mean |x − guided x0|, per sample."""
    clean, noise = draws()
    real, fake, texts = linear(0.5), linear(-0.2), (0.3, -0.1, 0.7)
    noisy = (1 - wide(SIGMA)) * clean + wide(SIGMA) * noise
    with_prompt = (1 - 0.5 * wide(SIGMA)) * noisy - 0.3 * wide(SIGMA)
    without = (1 - 0.5 * wide(SIGMA)) * noisy + 0.1 * wide(SIGMA)
    guided = with_prompt + guidance * (with_prompt - without)
    of_fake = (1 + 0.2 * wide(SIGMA)) * noisy - 0.7 * wide(SIGMA)
    size = (clean - guided).abs().flatten(1).mean(1)
    expected = (of_fake - guided) / wide(size)
    torch.testing.assert_close(
        dmd_gradient(clean, noise, SIGMA, real, fake, texts, guidance), expected
    )


def test_descending_the_dmd_gradient_leads_to_the_real_score() -> None:
    """The fake predicts x0 = x, the real 2: x − step · g approaches 2, scaled per sample."""
    clean, noise = (
        torch.tensor([3.0, -8.0]).view(2, 1, 1, 1, 1).expand(SHAPE).contiguous(),
        draws()[1],
    )
    gradient = dmd_gradient(clean, noise, SIGMA, aiming(2.0), aiming(clean), (0.0, 0.0, 0.0), 0.0)
    torch.testing.assert_close(
        gradient, torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1).expand(SHAPE)
    )


def test_guidance_leads_away_from_what_no_prompt_gives() -> None:
    """With a prompt the real predicts 1, without −1: guidance 3 aims at 1 + 3 · 2 = 7."""
    clean, noise = torch.zeros(SHAPE), draws()[1]
    real = Toy(lambda x, sigma, text: (x - text) / sigma)
    gradient = dmd_gradient(clean, noise, SIGMA, real, aiming(clean), (1.0, -1.0, 0.0), 3.0)
    torch.testing.assert_close(gradient, torch.full(SHAPE, -1.0))
    half = dmd_gradient(
        clean, noise, SIGMA, real, aiming(torch.full(SHAPE, 3.5)), (1.0, -1.0, 0.0), 3.0
    )
    torch.testing.assert_close(half, torch.full(SHAPE, -0.5))


def test_the_size_of_a_gradient_is_the_mean_distance_of_its_sample() -> None:
    clean = torch.zeros(SHAPE)
    clean[0, 0] = (
        # a third of the first sample: mean |x| is 4; the second one's is 0, which divides nothing
        12.0
    )
    sigma = torch.tensor([0.25, 0.5])  # x0 = x − σ (x / σ) is 0 exactly
    gradient = dmd_gradient(
        clean, draws()[1], sigma, aiming(0.0), aiming(1.0), (0.0, 0.0, 0.0), 0.0
    )
    torch.testing.assert_close(gradient[0], torch.full(SHAPE[1:], 0.25))
    assert gradient[1].isfinite().all() and gradient[1].min() > 1e6


def test_networks_are_asked_for_whole_clips_at_a_thousand_sigma() -> None:
    clean, noise = draws()
    real, fake = linear(0.5), linear(0.5)
    dmd_gradient(clean, noise, SIGMA, real, fake, (1.0, 2.0, 3.0), 3.0)
    assert [text for _, _, text in real.calls] == [1.0, 2.0]
    assert [text for _, _, text in fake.calls] == [3.0]
    for t, view, _ in real.calls + fake.calls:
        assert t.tolist() == [[250.0], [pytest.approx(800.0)]]
        assert view.positions == WholeClip(SHAPE[2]).positions
    assert whole_flow(real, clean, SIGMA, 0.0).shape == SHAPE


def test_without_guidance_the_empty_prompt_takes_no_pass() -> None:
    clean, noise = draws()
    real = linear(0.5)
    dmd_gradient(clean, noise, SIGMA, real, linear(0.5), (1.0, 2.0, 3.0), 0.0)
    assert [text for _, _, text in real.calls] == [1.0]


def test_the_dmd_loss_has_the_gradient_divided_by_the_number_of_values() -> None:
    clean, gradient = draws()
    clean.requires_grad_()
    loss = dmd_loss(clean, gradient)
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(clean.grad, gradient / gradient.numel())


def test_the_critic_learns_the_flow_from_samples_to_noise() -> None:
    """mean (v(x_t) − (ε − x0))² with x_t = (1 − σ) x0 + σ ε; 0 where the network gives ε − x0."""
    clean, noise = draws()
    toy = linear(0.5)
    noisy = (1 - wide(SIGMA)) * clean + wide(SIGMA) * noise
    expected = (0.5 * noisy + 0.3 - (noise - clean)).square().mean()
    assert critic_loss(toy, clean, noise, SIGMA, 0.3).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    assert toy.calls[0][0].flatten().tolist() == pytest.approx([250.0, 800.0])
    right = Toy(lambda x, sigma, text: noise - clean)
    assert critic_loss(right, clean, noise, SIGMA, 0.0).item() == 0.0


def test_levels_are_drawn_uniformly_shifted_and_kept_inside() -> None:
    options = DmdOptions()
    assert (options.low, options.high, options.shift, options.guidance) == (0.02, 0.98, 5.0, 3.0)
    assert shifted(torch.tensor([0.0, 0.5, 1.0]), 5.0).tolist() == pytest.approx(
        [0.0, 2.5 / 3, 1.0]
    )
    u = torch.rand(4096, generator=torch.Generator().manual_seed(3))
    sigma = draw_sigma(4096, options, torch.Generator().manual_seed(3))
    torch.testing.assert_close(sigma, (5 * u / (1 + 4 * u)).clamp(0.02, 0.98))
    assert (sigma.min().item(), sigma.max().item()) == pytest.approx((0.02, 0.98))
    narrow = draw_sigma(4096, DmdOptions(low=0.4, high=0.6), torch.Generator().manual_seed(3))
    assert narrow.min() >= 0.4 and narrow.max() <= 0.6


def layer(values: list[float]) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(values))
    return module


@pytest.mark.parametrize("average", [0.99, 0.05])
def test_the_average_after_one_and_two_steps_by_hand(average: float) -> None:
    """AdamW's first step is rate · sign(gradient); the EMA decay is min(a, (i+1)/(i+8))."""
    module = layer([1.0, -2.0])
    learner = Learner(module, 0.1, average, betas=(0.0, 0.999))
    kept = torch.tensor([1.0, -2.0])
    for index in range(2):
        learner.step((module.weight * torch.tensor([3.0, -0.5])).sum(), index, 1.0, clip=100.0)
        keep = min(average, (index + 1) / (index + 8))
        kept = keep * kept + (1 - keep) * module.weight.detach()
        torch.testing.assert_close(next(learner.average.parameters()).detach(), kept)
        assert not next(learner.average.parameters()).requires_grad
        if index == 0:
            torch.testing.assert_close(module.weight.detach(), torch.tensor([0.9, -1.9]))
    torch.testing.assert_close(learner.state_dict()["average"]["weight"], kept)
    fresh = Learner(layer([0.0, 0.0]), 0.1, average)
    fresh.load_state_dict(learner.state_dict())
    torch.testing.assert_close(next(fresh.average.parameters()).detach(), kept)


def test_the_betas_are_those_that_were_given() -> None:
    """With β1 = 0: rate · g / √v̂, v̂ = (β2 (1 − β2) g1² + (1 − β2) g2²) / (1 − β2²)."""
    module = layer([0.0])
    learner = Learner(module, 0.1, 0.0, betas=(0.0, 0.9))
    learner.step(module.weight.sum() * 3.0, 0, 1.0, clip=100.0)
    learner.step(module.weight.sum() * -1.0, 1, 1.0, clip=100.0)
    second = (0.9 * 0.1 * 9 + 0.1 * 1) / (1 - 0.81)
    assert module.weight.item() == pytest.approx(-0.1 + 0.1 / second**0.5, rel=1e-5)


def test_rate_factor_decay_and_clip_by_hand() -> None:
    module = layer([1.0, -2.0])
    learner = Learner(module, 0.1, 0.0, decay=0.5)
    assert learner.average is module
    learner.step((module.weight * torch.tensor([3.0, 4.0])).sum(), 0, 0.5, clip=1.0)
    torch.testing.assert_close(
        module.weight.grad, torch.tensor([0.6, 0.8]), msg="a norm of 5 becomes one of 1"
    )
    rate = 0.05
    expected = torch.tensor([1.0, -2.0]) * (1 - rate * 0.5) - rate * torch.ones(2)
    torch.testing.assert_close(module.weight.detach(), expected)
    small = layer([1.0])
    Learner(small, 0.1, 0.0).step(small.weight.sum() * 0.2, 0, 1.0, clip=1.0)
    torch.testing.assert_close(
        small.weight.grad, torch.tensor([0.2]), msg="a norm below the limit stays"
    )


def test_a_gradient_is_clipped_to_4_times_the_median_of_the_norms_before() -> None:
    module = layer([0.0, 0.0])
    learner = Learner(module, 0.1, 0.0)
    assert learner.usual_norm() == math.inf

    def after(norm: float, index: int) -> float:
        learner.step(
            (module.weight * torch.tensor([0.6 * norm, 0.8 * norm])).sum(), index, 1.0, clip=None
        )
        return module.weight.grad.norm().item()

    assert after(1e4, 0) == pytest.approx(1e4)  # no norm is known before the first
    assert [after(norm, index) for index, norm in ((1, 1.0), (2, 2.0), (3, 3.0))] == pytest.approx(
        [1, 2, 3]
    )
    assert learner.usual_norm() == 2  # of 1, 2, 3, 1e4: the lower middle
    assert after(100.0, 4) == pytest.approx(8)
    assert learner.usual_norm() == 3  # clipped norms count unclipped
    fresh = Learner(layer([0.0, 0.0]), 0.1, 0.0)
    fresh.load_state_dict(learner.state_dict())
    assert fresh.usual_norm() == 3
    for index in range(5, 5 + NORMS):
        after(7.0, index)
    assert learner.usual_norm() == pytest.approx(7)  # older ones are forgotten


def test_a_rate_warms_up_and_falls_on_a_half_cosine() -> None:
    assert warm_cosine(0, 1000) == pytest.approx(0.01)
    assert warm_cosine(500, 1000) == pytest.approx(0.02 + 0.98 * 0.5)
    assert warm_cosine(1000, 1000) == pytest.approx(0.02)
