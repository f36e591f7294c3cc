"""The training loop: what a run's folder holds at any time, and what it refuses to go on with."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from autorefiner.refiner.training.learner import Learner, LearnerStage
from autorefiner.refiner.training.loop import LoopOptions, restore, train


class Line(LearnerStage):
    """Fits weights to one; `at` is called with each step's number."""

    def __init__(self, size: int, at=lambda index: None) -> None:
        self.learner = Learner(nn.ParameterList([torch.zeros(size)]), 0.1, 0.0)
        self.at = at

    def step(self, index: int) -> dict[str, float]:
        self.at(index)
        loss = (self.learner.model[0] - 1).square().mean()
        self.learner.step(loss, index, 1.0)
        return {"loss": loss.item()}

    def show(self, folder: Path, index: int) -> dict[str, float]:
        return {}


def test_a_run_that_goes_on_never_lacks_a_line_of_its_log(tmp_path) -> None:
    train(Line(2), LoopOptions(tmp_path, 3))
    logged = (tmp_path / "log.jsonl").read_text()
    seen = []
    train(Line(2, at=lambda index: seen.append((tmp_path / "log.jsonl").read_text())), LoopOptions(tmp_path, 5))
    assert seen[0] == logged  # before the first new line: what a kill would leave
    assert [json.loads(line)["step"] for line in seen[1].splitlines()] == [0, 1, 2, 3]


def test_a_state_of_another_training_is_refused_in_one_line(tmp_path) -> None:
    train(Line(2), LoopOptions(tmp_path, 1))
    with pytest.raises(ValueError, match=r"holds another training .*: give the options that it was begun with") as told:
        restore(Line(3), tmp_path)
    assert "\n" not in str(told.value)
    assert restore(Line(2), tmp_path) == 1
