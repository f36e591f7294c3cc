"""Agreement of gradients between independent batches, by hand and as training logs it."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from autorefiner.refiner.training.gradient_signal import ENOUGH, Agreement, Signal, agreement, flat
from autorefiner.refiner.training.probe import FINAL, OTHERS, Probe, probe

from tiny_stage import REWARD, SMALL, stage_of


def test_equal_gradients_are_all_signal_and_opposite_ones_are_none() -> None:
    found = agreement(torch.tensor([[3.0, 4.0]] * 4))
    assert found.cosine == pytest.approx(1)
    assert found.error == pytest.approx(0)
    assert found.share == pytest.approx(1)
    assert found.seen
    other = agreement(torch.eye(4))
    assert other.cosine == pytest.approx(0)
    assert other.share == pytest.approx(0)
    assert not other.seen


def test_agreement_by_hand() -> None:
    """Pairwise cosines are 0, 1/√2 and 1/√2; the mean gradient is (2/3, 2/3), its power 8/9."""
    found = agreement(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    assert found.cosine == pytest.approx(2 / 3 / math.sqrt(2))
    power = 4 / 3
    assert found.share == pytest.approx((8 / 9 - (power - 8 / 9) / 2) / power)
    # The pair left after dropping each.
    left_out = torch.tensor([1 / math.sqrt(2), 1 / math.sqrt(2), 0.0])
    error = math.sqrt(2 / 3 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.error == pytest.approx(error)


def test_a_common_part_is_found_in_noise_and_noise_alone_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 4096, generator=generator)
    common = torch.randn(4096, generator=generator)
    assert not agreement(noise).seen
    found = agreement(noise + 0.5 * common)
    assert found.seen
    assert found.share == pytest.approx(0.25 / 1.25, abs=0.03)
    assert found.cosine == pytest.approx(0.25 / 1.25, abs=0.03)


def test_parameters_without_a_gradient_are_left_out() -> None:
    assert flat([torch.ones(2, 1), None, torch.zeros(1)]).tolist() == [1, 1, 0]


def test_a_training_logs_the_cosine_with_the_update_before() -> None:
    signal = Signal()
    assert signal.compare([torch.tensor([1.0, 0.0])]) == {}
    assert signal.compare([torch.tensor([1.0, 1.0])])["signal"].item() == pytest.approx(
        1 / math.sqrt(2)
    )
    assert signal.compare([torch.tensor([-2.0, -2.0])])["signal"].item() == pytest.approx(-1)


@pytest.mark.parametrize("common", [0.0, 1.0])
def test_a_training_without_a_signal_says_so_once(common: float) -> None:
    signal, generator = Signal(), torch.Generator().manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2 * ENOUGH):
            signal.compare([common + torch.randn(64, generator=generator)])
    assert ["no signal" in str(one.message) for one in said] == ([] if common else [True])


@pytest.mark.parametrize(("errors", "warns"), [(1.9, True), (2.1, False)])
def test_a_signal_is_two_standard_errors(errors: float, warns: bool) -> None:
    signal = Signal()
    deviation = math.sqrt(ENOUGH / (ENOUGH - 1))  # as many 1 as -1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(ENOUGH):
            signal._judge(errors * deviation / math.sqrt(ENOUGH) + (-1) ** number)
    assert bool(said) == warns


def test_steps_log_the_signal_from_the_second_update_on() -> None:
    stage = stage_of(REWARD)
    logged = [stage.step(index) for index in range(3)]
    assert ["signal" in row for row in logged] == [False, True, True]
    assert -1 <= logged[2]["signal"] <= 1


@pytest.mark.parametrize(("start", "parts"), [("head", {FINAL}), ("flow", {FINAL, OTHERS})])
def test_a_probe_tells_which_branches_a_gradient_reaches(start: str, parts: set[str]) -> None:
    found = probe(stage_of(replace(REWARD, start=start)), 3)
    assert {*found.parts} == parts
    lines = found.lines()
    assert lines[1].startswith("  final layer mean cosine")
    assert ("no gradient" in lines[2]) == (OTHERS not in parts) and "others" in lines[2]


def test_a_signal_of_one_part_is_a_signal() -> None:
    none, clear = Agreement(0.01, 0.02, 0.0), Agreement(0.2, 0.02, 0.2)
    for parts, seen in (({FINAL: none, OTHERS: none}, False), ({FINAL: none, OTHERS: clear}, True)):
        found = Probe(3, 4, none, parts, {}, None)
        assert found.seen == seen and ("yes" in found.lines()[-1]) == seen


@pytest.mark.parametrize("options", [SMALL, REWARD], ids=["dmd", "reward"])
def test_a_probe_changes_nothing_and_says_what_it_saw(options) -> None:
    stage = stage_of(replace(options, batch=4))
    before = {name: factor.clone() for name, factor in stage.factors.items()}
    found = probe(stage, 3)
    assert all(torch.equal(factor, before[name]) for name, factor in stage.factors.items())
    assert all(factor.grad is None for factor in stage.factors.values())
    assert (found.batches, found.clips, found.held_out) == (3, 4, None)
    assert -1 <= found.signal.cosine <= 1
    lines = found.lines()
    assert "3 batches of 4 clips" in lines[0]
    assert any(line.startswith("Δ at 750") for line in lines)
    assert ("yes" in lines[-1]) == found.seen
    with pytest.raises(ValueError, match="at least 3"):
        probe(stage, 2)
