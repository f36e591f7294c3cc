"""A bundled model is one row of a table: sampling and training use the row, never its name."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_files import write_demo_files
from safetensors.torch import load_file

from autorefiner.refiner import bundles
from autorefiner.refiner import train as training
from autorefiner.refiner.bundles import BUNDLES, bundled_refiners, refiner_file, sprites
from autorefiner.refiner.cli import main
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.train import make_stage
from autorefiner.refiner.train_config import TrainConfig

from tiny_bundle import use_bundle, write_tiny_bundle
from tiny_command import parse

PROMPT = "a red star circles on a navy ground"


@pytest.fixture
def row(tmp_path: Path, monkeypatch) -> bundles.Bundle:
    """Add a row with its own files: the same model under another name."""
    folder = write_demo_files(tmp_path / "other")
    shutil.copy(folder / "sprites_student.safetensors", folder / "model.safetensors")
    row = replace(
        sprites(folder), name="other", model=folder / "model.safetensors", size=(32, 48),
        refiners={"other-refiner": folder / "sprites.refiner.safetensors"},
    )  # fmt: skip
    monkeypatch.setitem(BUNDLES, "other", row)
    monkeypatch.setitem(BUNDLES, "sprites", sprites(folder))
    return row


def generate(out: Path, model: str, *more: str) -> torch.Tensor:
    """Return the latents of a short clip."""
    arguments = ["generate", "--model", model, "--prompt", PROMPT, "--out", str(out)]
    usual = ["--frames", "9", "--save-latents", "--device", "cpu"]
    assert main([*arguments, *usual, *more]) == 0
    return load_file(out.with_suffix(".latents.safetensors"))["latents"]


def test_one_row_makes_a_model_that_is_sampled_and_refined_by_name(row, tmp_path, capsys) -> None:
    plain = generate(tmp_path / "a.mp4", "other")
    assert plain.shape[-2:] == (6, 4)  # the row's size
    assert torch.equal(plain, generate(tmp_path / "b.mp4", "sprites", "--size", "32x48"))
    refined = generate(tmp_path / "c.mp4", "other", "--refiner", "other-refiner")
    assert not torch.equal(plain, refined)
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "other-refiner" in shown and "other 32x48" in shown


def test_one_row_makes_a_base_that_is_trained_by_name(row, tmp_path, monkeypatch) -> None:
    pytest.importorskip("peft")
    write_tiny_bundle(tmp_path / "models")
    use_bundle(tmp_path / "models", monkeypatch.setattr)
    other = replace(sprites(tmp_path / "models"), name="other", preset="causvid")
    monkeypatch.setitem(bundles.BUNDLES, "other", other)
    path = tmp_path / "small.toml"
    named = "".join(f'{name} = "other"\n' for name in ("base", "teacher", "prompts", "vae"))
    path.write_text(f'out = "small.safetensors"\n{named}[refiner]\nbatch = 2\n')
    config = TrainConfig.read(path)
    stage = make_stage(config, torch.device("cpu"))
    assert config.preset == "causvid" and config.refiner.levels == (757, 522)
    assert len(stage.prompts) == training.BUNDLED_PROMPTS
    assert len(stage.held_out) == training.HELD_OUT
    weight = load_file(other.model)["head.head.weight"].float()
    assert torch.equal(stage.base.model.head.head.weight, weight)


def test_an_untrained_bundle_is_no_base_of_a_training(tmp_path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('out = "small.safetensors"\nbase = "random-tiny"\n')
    with pytest.raises(ValueError, match="prompts"):
        TrainConfig.read(path)


@pytest.mark.parametrize(
    ("model", "more", "expected"),
    [
        ("sprites", [], 0),
        ("sprites", ["--size", "64x80"], 1),
        ("sprites", ["--context", "context.safetensors", "--size", "64x80"], 0),
        ("random-tiny", ["--size", "64x64"], 1),
        ("random-tiny", ["--size", "64x64", "--context", "context.safetensors"], 1),
    ],
)
def test_a_row_warns_of_what_its_model_does_not_know(model, more, expected, tmp_path) -> None:
    arguments = ["generate", "--model", model, "--prompt", PROMPT, "--out", str(tmp_path / "a.mp4")]
    job = prepare(parse([*arguments, "--frames", "9", "--dry-run", "--device", "cpu", *more]))
    assert len(notes(job)) == expected


def test_a_bundled_refiner_that_is_missing_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(BUNDLES, "sprites", sprites(tmp_path))
    assert set(bundled_refiners()) == {"sprites"}
    with pytest.raises(ValueError, match="sprites"):
        refiner_file("sprites")
    assert refiner_file("mine.safetensors") is None
