"""Every training stage takes two steps, and a run that was killed goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autorefiner.refiner.cli import main
from autorefiner.refiner.demo.bundle import (
    load_sprite_network,
    load_sprite_text,
    load_sprite_vae,
    recipe_of,
    scaled_vae,
)
from autorefiner.refiner.demo.captions import Caption, Stated, unknown_words, words
from autorefiner.refiner.demo.evaluation import describe_recipes, list_totals
from autorefiner.refiner.demo.recipes import tiny, vae
from autorefiner.refiner.demo.recipes.data import DIAGONALS, Clips
from autorefiner.refiner.demo.recipes.teacher import (
    WIDTHS,
    LongerOptions,
    TeacherOptions,
    TeacherStage,
    teacher_batch,
)
from autorefiner.refiner.demo.recipes.text import (
    GROUND,
    QUESTIONS,
    TextOptions,
    TextStage,
    answers,
    owners,
)
from autorefiner.refiner.demo.recipes.vae import psnr, reconstruct
from autorefiner.refiner.demo.text_encoder import SpriteTextEncoder
from autorefiner.refiner.demo.world import sample_scene
from autorefiner.refiner.files import open_exclusive
from autorefiner.refiner.training.loop import LoopOptions, restore, save, train
from autorefiner.refiner.wan.checkpoint import inspect
from autorefiner.refiner.wan.vae import LATENT_STD, WanVAE

from tiny import TINY

STAGES = ["vae", "decoder", "text", "tiny", "teacher", "longer", "init", "student", "reward"]


def train_stage(folder: Path, what: str) -> None:
    """`demo train` of a stage, or of all, with two steps each."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("the sprites' recipes need torch 2.9, for Muon")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autorefiner.refiner.demo.recipes.data.SHARD", 2)
        patch.setattr(vae, "HELD_OUT", 8)
        patch.setattr(vae, "latent_statistics", partial(vae.latent_statistics, clips=4))
        patch.setattr(tiny, "SHOWN", 1)
        patch.setitem(WIDTHS, TeacherOptions().width, dict(num_heads=8, ffn_dim=64, num_layers=2))
        size = ["--steps", "2", "--batch", "2", "--shards", "1", "--shown", "2", "--failures", "2"]
        often = ["--save-every", "1", "--show-every", "2", "--device", "cpu"]
        assert main(["demo", "train", what, "--run", str(folder), *size, *often]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """All stages, of which those that are there already are not trained again."""
    train_stage(folder, "all")
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_logs_draws_and_shows(folder, stage) -> None:
    """In this order: each stage needs the models of those before it."""
    for each in ("clips", stage) if stage == "tiny" else (stage,):
        train_stage(folder, each)
    run = folder
    lines = [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(line["loss"] > 0 for line in lines)
    assert (run / stage / "loss.png").read_bytes().startswith(b"\x89PNG")
    shown = (
        run / stage / ("answers_000002.txt" if stage in ("text", "reward") else "sheet_000002.png")
    )
    assert shown.stat().st_size > 0


def test_the_student_is_a_fifth_of_its_teachers_size(run) -> None:
    networks = [load_sprite_network("student", run), load_sprite_network("student")]
    for config in (network.config for network in networks):
        assert (config.dim, config.num_heads, config.num_layers, config.ffn_dim) == (128, 1, 4, 512)
    networks = networks[1], load_sprite_network("teacher")
    small, whole = (sum(one.numel() for one in network.model.parameters()) for network in networks)
    assert small < 0.22 * whole


def test_the_finished_models_load_and_say_what_they_are(run) -> None:
    info = inspect(run / "sprites_student.safetensors")
    assert (info.kind, info.preset, info.preset_reason) == (
        "transformer",
        "self-forcing",
        "its metadata names it",
    )
    config = json.loads(info.metadata["config"])["transformer"]
    assert config["causal_ar"] is True
    student, text = load_sprite_network("student", run), load_sprite_text(run)
    assert student.config.text_dim == text.text_dim
    assert (
        json.loads(inspect(run / "sprites_vae.safetensors").metadata["autorefiner"])["steps"] == 2
    )


def test_a_model_tells_its_recipes_and_how_its_total_rose(run) -> None:
    last = json.loads((run / "student" / "log.jsonl").read_text().splitlines()[-1])
    assert recipe_of("student", run)["totals"] == {"2": round(last["total"], 1)}
    recipes = "vae 2 and decoder 2 steps, teacher 2 and longer 2 steps, init 2 and student 2 steps"
    assert describe_recipes(run) == recipes
    assert list_totals(run)[-1] == f"- student: {last['total']:.1f} (2)"
    assert "totals" not in recipe_of("vae", run)


def test_clips_are_encoded_with_the_runs_own_vae(run) -> None:
    clips = Clips.read(run / "clips")
    assert clips.latents.shape == (2, 16, 21, 8, 8)
    assert clips.captions[1] == sample_scene(1).caption
    with pytest.raises(ValueError, match="demo train clips"):
        Clips.read(run)


def test_diagonal_bounces_are_drawn_more_often() -> None:
    straight, diagonal = (
        Caption("", (Stated("star", "red", "bounce", direction=way),)) for way in ("up", "up left")
    )
    clips = Clips(torch.zeros(3, 16, 21, 8, 8), [straight, diagonal, straight])
    assert clips.drawn.tolist() == [0, *[1] * DIAGONALS, 2]


def test_a_longer_training_begins_with_the_teacher(run) -> None:
    clips, text, vae = Clips.read(run / "clips"), load_sprite_text(run), load_sprite_vae(run)
    teacher = load_sprite_network("teacher", run)
    stage = TeacherStage(
        LongerOptions(batch=2, steps=2), clips, text, vae, torch.device("cpu"), teacher
    )
    begun = stage.learner.model.state_dict()
    assert all(
        torch.equal(begun[name], tensor) for name, tensor in teacher.model.state_dict().items()
    )
    assert teacher_batch(stage.options, clips, 0)[0].shape[2] == clips.latents.shape[2]


def test_the_student_learnt_from_its_own_rollouts(run) -> None:
    state = torch.load(run / "student" / "state.pt", weights_only=True)["stage"]
    start = torch.load(run / "init" / "state.pt", weights_only=True)["stage"]["average"]
    name = "blocks.0.self_attn.v.weight"
    assert not torch.equal(state["generator"]["model"][name], start[name].bfloat16().float())
    assert not torch.equal(state["critic"]["model"][name], state["generator"]["model"][name])


def test_a_killed_run_goes_on_with_the_same_losses(tmp_path) -> None:
    """Text stage, killed after its fifth step with the state of the fourth on disk."""
    options = [
        "--steps",
        "8",
        "--batch",
        "4",
        "--save-every",
        "2",
        "--show-every",
        "8",
        "--device",
        "cpu",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["demo", "train", "text", "--run", str(whole), *options]) == 0
    script = (
        "import os, signal, sys\n"
        "from autorefiner.refiner.cli import main\n"
        "from autorefiner.refiner.demo.recipes.text import TextStage\n"
        "step = TextStage.step\n"
        "def killer(self, index):\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if index == 5 else step(self, index)\n"
        "TextStage.step = killer\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["demo", "train", "text", "--run", str(killed), *options]
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments], check=False, capture_output=True, env=os.environ
    )
    assert process.returncode == -signal.SIGKILL
    assert main(arguments) == 0

    def losses(folder: Path) -> list[tuple[int, float]]:
        rows = map(json.loads, (folder / "text" / "log.jsonl").read_text().splitlines())
        return [(row["step"], row["loss"]) for row in rows]

    assert losses(killed) == losses(whole)
    left, right = (load_file(folder / "sprites_text.safetensors") for folder in (whole, killed))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_state(tmp_path) -> None:
    stage = TextStage(TextOptions(steps=4, batch=2), torch.device("cpu"))
    train(stage, LoopOptions(tmp_path, 2))
    stage.step = lambda index: {"loss": float("nan")}
    with pytest.raises(ValueError, match="step 2 gave"):
        train(stage, LoopOptions(tmp_path, 4))
    assert restore(TextStage(TextOptions(steps=4, batch=2), torch.device("cpu")), tmp_path) == 2
    with pytest.raises(ValueError, match="at least 1"):
        LoopOptions(tmp_path, 0)


def test_one_training_a_folder(tmp_path) -> None:
    with open_exclusive(tmp_path / "lock"), pytest.raises(ValueError, match="another folder"):
        train(
            TextStage(TextOptions(steps=4, batch=2), torch.device("cpu")), LoopOptions(tmp_path, 2)
        )


def test_a_state_is_replaced_whole(tmp_path) -> None:
    stage = TextStage(TextOptions(), torch.device("cpu"))
    save(stage, tmp_path, 3)
    before = (tmp_path / "state.pt").read_bytes()
    stage.state_dict = lambda: {"unsavable": lambda: None}
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save(stage, tmp_path, 4)
    assert (tmp_path / "state.pt").read_bytes() == before


@torch.no_grad()
def test_scaling_the_latents_changes_their_statistics_and_no_pixel() -> None:
    torch.manual_seed(0)
    vae = WanVAE(4, latent_mean=0.0, latent_std=1.0)
    pixels = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    raw = vae.encode(pixels)
    mean, std = raw.mean(dim=(0, 2, 3, 4)), raw.std(dim=(0, 2, 3, 4))
    scaled = scaled_vae(vae, mean, std)
    latents = scaled.encode(pixels)
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-4
    assert (latents.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-3
    assert (reconstruct(scaled, pixels) - reconstruct(vae, pixels)).abs().max() < 1e-4
    change = scaled.moments(pixels)[1] - vae.moments(pixels)[1]
    expected = 2 * (torch.tensor(LATENT_STD) / std).log()
    assert torch.allclose(change.mean(dim=(0, 2, 3, 4)), expected, atol=1e-4)


def test_psnr_is_in_decibel_of_the_whole_range() -> None:
    assert psnr(torch.full((4,), 0.2), torch.zeros(4)) == pytest.approx(20.0)


def test_answers_are_numbered_by_what_the_caption_states() -> None:
    caption = sample_scene(0).caption
    right = answers(caption)
    said = {
        name: choices[number - 1]
        for (name, choices), number in zip(QUESTIONS, right, strict=True)
        if number
    }
    assert said["0.shape"] == caption.objects[0].shape
    assert said.get("ground") == caption.ground
    alone = Caption("", (Stated("star", "red", "spin", direction="clockwise"),))
    assert [number > 0 for number in answers(alone)] == [True, True, True, False, True, False] + [
        False
    ] * 8


def owned(caption: Caption, owner: int) -> str:
    return " ".join(
        word
        for word, who in zip(words(caption.text), owners(caption, 32), strict=False)
        if who == owner
    )


def test_words_belong_to_their_object_or_the_ground() -> None:
    red, blue = Stated("star", "red", "bounce", size="small"), Stated("circle", "blue", "still")
    on_one = "a tiny red star bounces to the left of a blue ball that rests on an olive ground"
    caption = Caption(on_one, (red, blue), "left", "olive")
    assert owned(caption, 0) == "a tiny red star bounces to the left of"
    assert owned(caption, 1) == "a blue ball that rests"
    assert owned(caption, GROUND) == "on an olive ground"
    caption = Caption(
        "on a backdrop of navy over brown a red star bounces",
        (replace(red, size=None),),
        None,
        "navy over brown",
    )
    assert owned(caption, 0) == "a red star bounces"
    assert owned(caption, GROUND) == "on a backdrop of navy over brown"
    assert len(owners(caption, 4)) == 4


def test_words_of_every_caption_have_an_owner() -> None:
    for seed in range(200):
        caption = sample_scene(seed).caption
        owned = owners(caption, len(words(caption.text)))
        assert -1 not in owned
        assert {0, len(caption.objects) - 1} <= set(owned) and (2 in owned) == (
            caption.ground is not None
        )


def test_the_text_encoder_ends_in_zeros_and_says_what_it_does_not_know() -> None:
    encoder = SpriteTextEncoder(dim=16, text_len=TINY.text_len)
    context = encoder(["a red star", ""])
    assert context.shape == (2, TINY.text_len, 16)
    assert context[0, :3].abs().min(dim=-1).values.max() > 0
    assert not context[0, 3:].any()
    assert not context[1].any()
    assert unknown_words("a red dragon on a blue ground") == ["dragon"]
    assert torch.allclose(encoder(["a red star"])[0], context[0], atol=1e-6)
