"""`autorefiner train`: what a file may say, and that a killed training goes on as if it had not been."""

import json

import pytest
import torch
from safetensors.torch import load_file

from autorefiner.refiner import train as training
from autorefiner.refiner.cli import main
from autorefiner.refiner.demo.bundle import save_model
from autorefiner.refiner.demo.text_encoder import SpriteTextEncoder
from autorefiner.refiner.noise.file import fingerprint, load_refiner
from autorefiner.refiner.wan.checkpoint import inspect
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer
from autorefiner.refiner.wan.vae import WanVAE

pytest.importorskip("peft")

SIZES = WanConfig(dim=32, num_heads=2, ffn_dim=32, num_layers=2, text_dim=16, text_len=32)


@pytest.fixture(autouse=True)
def bundle(tmp_path, monkeypatch):
    """Tiny random models in the bundle's place: what is tried here is the training, not what it learns."""
    torch.manual_seed(0)
    models = tmp_path / "models"
    save_model(models, "vae", WanVAE(4), None, {})
    save_model(models, "text", SpriteTextEncoder(16), None, {})
    for name in ("teacher", "student"):
        save_model(models, name, WanTransformer(SIZES), SIZES, {})
    for name in ("load_sprite_vae", "load_sprite_text"):
        loaded = getattr(training, name)(models)
        monkeypatch.setattr(training, name, lambda loaded=loaded: loaded)
    monkeypatch.setattr(training, "SPRITE_PROMPTS", 8)
    load = training.load_sprite_network
    monkeypatch.setattr(training, "load_sprite_network", lambda name, device: load(name, models, device))
    return models


def write(folder, more: str = "", inner: str = ""):
    path = folder / "small.toml"
    path.write_text(
        f'out = "small.safetensors"\nsave_every = 1\nshow_every = 100\n{more}\n'
        f"[refiner]\nsteps = 4\nbatch = 2\nrank = 2\nframes = 6\nratio = 2\nshown = 1\n{inner}\n"
    )
    return path


def losses(run) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row.get("gradient")) for row in rows]


@pytest.mark.parametrize("previous", ["pending", "joint", "none"])
def test_a_refiner_is_trained_and_says_how(tmp_path, bundle, previous) -> None:
    path = write(tmp_path, inner=f'previous = "{previous}"\nlevels = [750, 250]')
    assert main(["train", str(path), "--device", "cpu"]) == 0
    pairs, card = load_refiner(tmp_path / "small.safetensors")
    assert (card.rank, card.levels, card.previous, card.steps, card.objective) == (2, (750, 250), previous, 4, "dmd")
    assert card.base == fingerprint(training.load_sprite_network("student", "cpu").model)
    assert any(pair.up.any() for pair in pairs.values())
    assert any("change" in name for line in (tmp_path / "small_run" / "log.jsonl").read_text().splitlines()
               for name in json.loads(line))  # fmt: skip
    assert (tmp_path / "small_run" / "sheet_000004.png").exists()


def test_a_plain_lora_is_written_for_comfyui(tmp_path) -> None:
    assert main(["train", str(write(tmp_path, inner='method = "lora"')), "--device", "cpu"]) == 0
    assert inspect(tmp_path / "small.safetensors").kind == "lora"
    names = load_file(tmp_path / "small.safetensors")
    assert all(name.startswith("diffusion_model.") for name in names)


def test_the_initial_noise_refiner_is_trained_on_the_initial_noise(tmp_path) -> None:
    assert main(["train", str(write(tmp_path, inner='method = "init-noise"')), "--device", "cpu"]) == 0
    _, card = load_refiner(tmp_path / "small.safetensors")
    assert (card.levels, card.previous) == ((1000,), "none")


def test_a_training_that_was_stopped_goes_on_with_the_same_losses(tmp_path, monkeypatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
        write(folder)
    assert main(["train", str(whole / "small.toml"), "--device", "cpu"]) == 0
    step = training.RefineStage.step
    with monkeypatch.context() as patch:

        def stop(self, index: int):
            if index == 3:
                raise KeyboardInterrupt
            return step(self, index)

        patch.setattr(training.RefineStage, "step", stop)
        assert main(["train", str(stopped / "small.toml"), "--device", "cpu"]) == 130
    assert main(["train", str(stopped / "small.toml"), "--device", "cpu"]) == 0
    assert losses(stopped / "small_run") == losses(whole / "small_run")
    left, right = (load_file(folder / "small.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("more", "inner", "said"),
    [
        ("stpes = 3", "", "stpes is not known"),
        ("", "rnak = 3", "refiner.rnak is not known; did you mean refiner.rank?"),
        ("", 'seed = "many"', "refiner.seed is 'many', expected int"),
        ("", "levels = [900]", "levels [900] are none"),
        ("", 'method = "magic"', "method 'magic' is not known"),
        ("", 'previous = "some"', "use pending or joint or none"),
        ('prompts = "none.txt"', "", "is not there"),
        ("= 3", "", "is no TOML file"),
    ],
)
def test_what_a_file_cannot_say_is_one_line(tmp_path, capsys, more, inner, said) -> None:
    assert main(["train", str(write(tmp_path, more, inner)), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_empty_prompts_file_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert main(["train", str(write(tmp_path, 'prompts = "empty.txt"')), "--device", "cpu"]) == 2
    assert "is empty" in capsys.readouterr().err
