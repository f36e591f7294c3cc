"""Damaged training folders: a one-line error, or the run resumes from what is intact."""

import json
import random
from pathlib import Path

import pytest
import torch

from autorefiner.refiner.training.begun import begin
from autorefiner.refiner.training.curve import draw_curve
from autorefiner.refiner.training.learner import FirstHalf, Learner
from autorefiner.refiner.training.log import read_rows
from autorefiner.refiner.training.loop import LoopOptions, restore, save, train


class Weights:
    """A stage with a few numbers; every step adds 1."""

    def __init__(self) -> None:
        self.values = torch.zeros(64)

    def step(self, index: int) -> dict[str, float]:
        self.values += 1
        return {"loss": 1.0}

    def state_dict(self) -> dict:
        return {"values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.values.copy_(state["values"])

    def show(self, folder: Path, index: int) -> dict[str, float]:
        return {}


def test_a_state_with_a_single_bit_changed_is_refused_or_the_same(tmp_path: Path) -> None:
    stage = Weights()
    stage.values = torch.arange(64.0)
    save(stage, tmp_path, 3)
    path, choose = tmp_path / "state.pt", random.Random(0)
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        other = Weights()
        try:
            assert restore(other, tmp_path) == 3 and torch.equal(other.values, stage.values)
        except ValueError as error:
            refused += "damaged" in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    "state",
    [
        {"done": "3", "stage": {}}, {"done": -1, "stage": {}}, {"done": 3, "stage": []},
        {"done": 3}, [3], {"done": 3, "stage": {}}, {"done": 3, "stage": {"values": "x"}},
        {"done": 3, "stage": {"values": torch.zeros(3)}},
        {"done": 3, "stage": {"values": torch.zeros(64).to_sparse()}},
    ],
)  # fmt: skip
def test_a_state_of_something_else_is_one_line(state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state|training") as error:
        restore(Weights(), tmp_path)
    assert "\n" not in str(error.value)


def test_an_optimisers_state_is_of_its_own_parameters_and_brings_no_options() -> None:
    def learner() -> Learner:
        torch.manual_seed(0)
        return Learner(torch.nn.Linear(3, 2), 1e-3, 0.9)

    trained = learner()
    trained.step(trained.model(torch.ones(1, 3)).sum(), 0, 1.0)
    state = trained.state_dict()
    state["optimizer"]["param_groups"][0]["betas"] = "hostile"
    other = learner()
    other.load_state_dict(state)
    for one in (trained, other):
        one.step(one.model(torch.ones(1, 3)).sum(), 1, 1.0)
    assert torch.equal(trained.model.weight, other.model.weight)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match="shape"):
        learner().load_state_dict(state)
    state["optimizer"]["state"] = {9: state["optimizer"]["state"][1]}
    with pytest.raises(ValueError, match="another model"):
        learner().load_state_dict(state)


@pytest.mark.parametrize(
    "half", [{"index": "1", "logged": {}}, {"index": 1, "logged": {"loss": "x"}}, {"index": 1}]
)
def test_a_damaged_half_of_a_step_is_refused(half: dict) -> None:
    with pytest.raises((ValueError, KeyError)):
        FirstHalf().load_state_dict({"first_half": half})


DAMAGED = [
    b"", b"{}", b"[]", b"3", b'{"step": 1', b'{"step": "1"}', b'{"step": -1}', b'{"step": true}',
    b'{"step": 1.5}', b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": NaN}',
    b'{"step": 1, "loss": 1e999}', b'{"step": 1, "loss": [1]}', b'{"step": 1, "loss": null}',
    b"[" * 100_000, b"\xff\xfe", b"\0" * 50, b'{"step": ' + b"9" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_a_log_is_left_out_with_a_warning(line: bytes, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(
        b'{"step": 0, "loss": 1.5}\n' + line + b'\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo'
    )
    with pytest.warns(UserWarning, match="1 damaged"):
        assert read_rows(log) == [{"step": 0, "loss": 1.5}, {"step": 2, "loss": 0.5}]
    with pytest.warns(UserWarning, match="damaged"):
        assert read_rows(log, before=2) == [{"step": 0, "loss": 1.5}]
    with pytest.warns(UserWarning, match="damaged"):
        draw_curve(log, tmp_path / "loss.png")


def test_a_run_with_a_damaged_log_goes_on(tmp_path: Path) -> None:
    train(Weights(), LoopOptions(tmp_path, 2))
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\xff\n" + log.read_bytes())
    with pytest.warns(UserWarning, match="damaged"):
        train(Weights(), LoopOptions(tmp_path, 3))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"[", b"[" * 9999, b"null", b'"x"', b"\xff"])
def test_a_damaged_note_of_a_run_is_one_line(content: bytes, tmp_path: Path) -> None:
    begin(tmp_path, {"steps": 1}, ())
    save(Weights(), tmp_path, 1)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json") as error:
        begin(tmp_path, {"steps": 1}, ())
    assert "\n" not in str(error.value)


def test_words_about_a_preset_are_no_option_of_a_run(tmp_path: Path) -> None:
    preset = {"chunk": 3, "source": "one page"}
    begin(tmp_path, {"preset": preset}, ())
    save(Weights(), tmp_path, 1)
    # Older notes have fewer keys.
    begin(tmp_path, {"preset": preset | {"source": "another", "rolling": False}}, ())
    with pytest.raises(ValueError, match="preset"):
        begin(tmp_path, {"preset": preset | {"chunk": 1}}, ())


def test_an_older_note_calls_the_levels_of_a_preset_steps(tmp_path: Path) -> None:
    begin(tmp_path, {"preset": {"steps": [1000, 500], "first_steps": []}}, ())
    save(Weights(), tmp_path, 1)
    begin(tmp_path, {"preset": {"levels": [1000, 500], "first_levels": []}}, ())
    for changed in (
        {"levels": [1000], "first_levels": []},
        {"levels": [1000, 500], "first_levels": [1000]},
    ):
        with pytest.raises(ValueError, match="preset"):
            begin(tmp_path, {"preset": changed}, ())
