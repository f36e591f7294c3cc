"""Train Refiner LoRA without ComfyUI: what it trains and where, resuming, and refused input."""

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from comfy_graphs import node, training
from standalone_runs import execute, refusal, run_workflow

from autorefiner.nodes import train_plan, workflow
from autorefiner.nodes.curves import POINTS, Curves
from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.train_plan import check_name, run_folder
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.noise.file import fingerprint, load_refiner
from autorefiner.refiner.training.dmd_objective import DmdObjective
from autorefiner.refiner.training.loop import Unwatched
from autorefiner.refiner.training.options import RefineOptions
from autorefiner.refiner.training.refiner_stage import RefinerStage
from autorefiner.refiner.wan.vae import WanVAE

pytest.importorskip("peft")
SAVED = "models/loras/mine.refiner.safetensors"


def same(one: dict, other: dict) -> bool:
    return all(
        torch.equal(one[name].up, other[name].up) and torch.equal(one[name].down, other[name].down)
        for name in one
    )


def test_it_trains_what_the_core_does_and_says_how(base: Path, capsys) -> None:
    results = run_workflow(training(), base)
    refiner, losses, steps = results["3"].args
    student, teacher = (
        bundle.load_sprite_network(name, bundle.WEIGHTS) for name in ("student", "teacher")
    )
    text = bundle.load_sprite_text(bundle.WEIGHTS)
    options = RefineOptions(
        rank=2, steps=4, batch=2, accumulation=1, frames=6, height=4, width=4, learning_rate=1e-3,
        ratio=2, precision="fp32",
    )  # fmt: skip
    prompts = training()["3"]["inputs"]["prompts"].splitlines()
    stage = RefinerStage(
        options, student, DmdObjective(options, teacher, text), prompts, text, lambda *_: {}
    )
    logged = [stage.step(index)["loss"] for index in range(4)]
    assert losses == {"loss": logged} and steps == 4
    assert same(refiner.pairs, stage.average())
    assert any(pair.up.abs().sum() > 0 for pair in refiner.pairs.values())
    _, card = load_refiner(base / SAVED)
    assert (card.rank, card.steps, card.objective, card.levels) == (2, 4, "dmd", (750, 500, 250))
    assert card.base == fingerprint(student.model)
    run = base / "output" / "autorefiner" / "mine"
    assert {"state.pt", "log.jsonl", "loss.png", "run.json", "sheet_000004.png"} <= {
        path.name for path in run.iterdir()
    }
    assert workflow.written(results) == [run / "sheet_000004.png"]
    assert "4 steps in mine" in capsys.readouterr().err


def test_the_guidance_of_the_teacher_is_the_nodes(base: Path) -> None:
    asked = {"steps": 1, "vae": None}
    plain, own = (
        execute(training(run=f"g{g}", guidance=g, **asked), base)["3"]
        for g in (None, RefineOptions().guidance)
    )
    assert plain[1] == own[1] and same(plain[0].pairs, own[0].pairs)
    other = execute(training(run="other", guidance=0.0, **asked), base)["3"]
    assert not same(other[0].pairs, own[0].pairs)
    assert "guidance" in refusal(training(run="other", guidance=2.0, **asked), base)


class Stop(BaseException):
    """An interruption that is no Exception, like ComfyUI's."""


def stop_at_three(*arguments: object) -> None:
    """End the training at the report of step three, or at the sheet after it."""
    if 3 in arguments or any("sheet_000003" in str(one) for one in arguments):
        raise Stop


@pytest.mark.parametrize("place", ["report", "sheet", "draw", "decode"])
def test_an_interrupted_training_loses_no_step(base: Path, monkeypatch, place: str) -> None:
    with monkeypatch.context() as patch:
        watch = Unwatched()
        patch.setattr(standalone, "train_watch", lambda *_: nullcontext(watch))
        if place == "draw":
            patch.setattr(
                RefinerStage, "show", lambda stage, folder, done: stop_at_three(done) or {}
            )
        elif place == "decode":
            patch.setattr(WanVAE, "decode", lambda *_: stop_at_three(3))
        else:
            setattr(watch, place, stop_at_three)
        with pytest.raises(Stop):
            execute(training(preview_every=3, save_every=100), base)
    run = base / "output" / "autorefiner" / "mine"
    assert train_plan.steps_taken(run) == 3 and not (base / SAVED).exists()
    on, through = execute(training(), base)["3"], execute(training(run="other"), base)["3"]
    assert on[1] == through[1] and same(on[0].pairs, through[0].pairs)


def test_a_step_that_fails_between_the_updates_of_critic_and_refiner_loses_no_other(
    base: Path, monkeypatch
) -> None:
    teach = RefinerStage._teach

    def fail(stage: RefinerStage, index: int, update: int) -> dict:
        if index == 3:
            raise RuntimeError("out of memory")
        return teach(stage, index, update)

    with monkeypatch.context() as patch:
        patch.setattr(RefinerStage, "_teach", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            execute(training(vae=None), base)
    assert train_plan.steps_taken(base / "output" / "autorefiner" / "mine") == 3
    on, through = (
        execute(training(vae=None), base)["3"],
        execute(training(run="other", vae=None), base)["3"],
    )
    assert on[1] == through[1] and same(on[0].pairs, through[0].pairs)


@pytest.fixture
def ctrl_c() -> Iterator[object]:
    """Install the terminal's Ctrl-C handler; a background job may have started without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_training_behind_its_step_and_the_second_one_at_once(
    base: Path, monkeypatch, ctrl_c
) -> None:
    own = RefinerStage.step

    def step(stage: RefinerStage, index: int) -> dict:
        for _ in range({1: 1, 2: 2}.get(index, 0)):
            signal.raise_signal(signal.SIGINT)
        return own(stage, index)

    monkeypatch.setattr(RefinerStage, "step", step)
    run = base / "output" / "autorefiner" / "mine"
    for _ in range(2):  # the second training starts at step 2 and is stopped at once
        with pytest.raises(KeyboardInterrupt):
            execute(training(vae=None), base)
        assert train_plan.steps_taken(run) == 2 and signal.getsignal(signal.SIGINT) is ctrl_c


def test_a_run_goes_on_with_more_steps_and_under_no_other_options(base: Path) -> None:
    execute(training(steps=2, vae=None), base)
    assert "rank" in refusal(training(rank=3), base)
    assert "another words" in refusal(training(prompts="a blue star"), base)
    assert execute(training(vae=None), base)["3"][2] == 4
    assert "4 steps" in refusal(training(steps=3), base)


def test_a_run_that_failed_before_its_first_step_may_be_changed(base: Path, monkeypatch) -> None:
    def fail(stage: RefinerStage, index: int) -> dict:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(RefinerStage, "step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            execute(training(vae=None), base)
    assert execute(training(steps=1, batch_size=1, vae=None), base)["3"][2] == 1
    assert "batch" in refusal(training(), base)


def test_conditionings_train_as_their_prompts_do(base: Path) -> None:
    graph = training(
        run="listed", prompts="", clip=None, positive=["7", 0], negative=["8", 0], vae=None
    )
    prompts = training()["3"]["inputs"]["prompts"].splitlines()
    graph["5"], graph["6"] = (node("CLIPTextEncode", text=text, clip=["1", 1]) for text in prompts)
    graph["8"] = node("CLIPTextEncode", text="", clip=["1", 1])
    with pytest.MonkeyPatch.context() as patch:
        combine = {"execute": classmethod(lambda cls, one, other: workflow.NodeOutput(one + other))}
        patch.setitem(workflow.CLASSES, "Combine", combined(combine))
        graph["7"] = node("Combine", one=["5", 0], other=["6", 0])
        listed = execute(graph, base)["3"]
    written = execute(training(vae=None), base)["3"]
    assert listed[1] == written[1] and same(listed[0].pairs, written[0].pairs)


def combined(body: dict) -> type:
    """Combine two CONDITIONINGs, like ComfyUI's ConditioningCombine."""
    io = standalone.io
    schema = io.Schema(
        "Combine", inputs=[io.Conditioning.Input("one"), io.Conditioning.Input("other")],
        outputs=[io.Conditioning.Output()],
    )  # fmt: skip
    return type(
        "Combine", (io.ComfyNode,), {"define_schema": classmethod(lambda cls: schema), **body}
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"teacher": None}, "teacher"),
        ({"clip": None, "prompts": ""}, "empty prompt"),
        ({"prompts": " \n"}, "no prompts"),
        ({"prompts": "x\n" * 5000}, "4096"),
        ({"prompts": "x" * 2_000_000}, "1048576"),
        ({"objective": "reward"}, "needs reward"),
        ({"levels": "700"}, "levels [700]"),
        ({"length": 20}, "17 and 21"),
        ({"batch_size": 1000}, "1000 is bigger"),
        ({"steps": 10**9}, "bigger"),
        ({"run": "../elsewhere"}, "'../elsewhere'"),
        ({"model": ["1", 1]}, "MODEL"),
    ],
)
def test_what_cannot_be_trained_is_said(inputs: dict, message: str, base: Path) -> None:
    assert message in refusal(training(**inputs), base)
    assert not (base / "output" / "autorefiner").exists()


def test_a_device_without_room_is_told_before_anything_is_loaded(base: Path, monkeypatch) -> None:
    monkeypatch.setattr(standalone, "available_bytes", lambda device: 1000)
    assert "0.00 GB" in refusal(training(), base)


@pytest.mark.parametrize(
    "name", ["", "..", "a/../b", "/etc", "a\\b", ".hidden", "a/.b", "C:x", "x" * 300, "a.", "a\0b"]
)
def test_a_run_cannot_be_named_out_of_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="foxes"):
        check_name(name)


def test_a_link_does_not_lead_a_run_out_of_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "output" / "autorefiner").mkdir(parents=True)
    (tmp_path / "output" / "autorefiner" / "away").symlink_to(tmp_path)
    with (
        standalone.running_at(standalone.place_of(tmp_path, None, "cpu")),
        pytest.raises(ValueError, match="leaves"),
    ):
        run_folder("away/there")


def test_curves_stay_short_and_keep_their_mean(tmp_path: Path) -> None:
    curves = Curves()
    for step in range(10_001):
        curves.add(step, {"change 750": 1.0, "loss": step / 10_000})
    points = curves.points()
    assert list(points) == ["loss", "change 750"] and len(points["loss"]) <= POINTS
    assert points["loss"][-1][0] == 10_000
    assert abs(sum(value for _, value in points["loss"]) / len(points["loss"]) - 0.5) < 0.01
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 0, "loss": 1.0, "seconds": 2}\n{"step": 1, "loss": 3.0}\n{"step": 2, "lo'
    )
    assert Curves.read(log, 2).points() == {"loss": [[0, 1.0], [1, 3.0]]}
    assert Curves.read(tmp_path / "none", 2).points() == {}


@pytest.mark.parametrize("held", [b"", b"no state"])
def test_a_damaged_state_of_a_run_is_one_line(tmp_path: Path, held: bytes) -> None:
    assert train_plan.steps_taken(tmp_path) == 0
    (tmp_path / "state.pt").write_bytes(held)
    with pytest.raises(ValueError, match="damaged"):
        train_plan.steps_taken(tmp_path)
