"""The bundled models: their files, what they say, and that what they make is what was asked for."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autorefiner.refiner.cli import main
from autorefiner.refiner.demo import show as demo_show
from autorefiner.refiner.demo.bundle import (
    FILES,
    REFINERS,
    WEIGHTS,
    bundled_refiner,
    load_sprite_network,
    load_sprite_tiny,
    recipe_of,
)
from autorefiner.refiner.demo.captions import Caption, write
from autorefiner.refiner.demo.clips import BATCH, held_out, returned_clips, score, student_clips
from autorefiner.refiner.demo.controls import Control
from autorefiner.refiner.demo.evaluation import Demo
from autorefiner.refiner.demo.metrics.table import summarise, totals_of
from autorefiner.refiner.demo.recipes.vae import psnr
from autorefiner.refiner.demo.render import clip_batch, render, to_pixels
from autorefiner.refiner.demo.scene import Body
from autorefiner.refiner.demo.show import ENOUGH, name_plate
from autorefiner.refiner.demo.world import sample_scene
from autorefiner.refiner.noise.file import fingerprint, load_refiner
from autorefiner.refiner.rollout import add_noise, predict_x0
from autorefiner.refiner.training.dmd import whole_flow
from autorefiner.refiner.video import read_metadata
from autorefiner.refiner.wan.weight_file import open_weights

from decoding import decoded

WORKFLOWS = Path(__file__).parents[2] / "workflows" / "api"
MODELS = ("text", "vae", "tiny", "teacher", "student")


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo.load(WEIGHTS, torch.device("cpu"))


def test_the_files_are_small_and_say_what_they_are() -> None:
    assert sum((WEIGHTS / FILES[name]).stat().st_size for name in MODELS) <= 20 * 2**20
    for name in MODELS:
        assert recipe_of(name)["steps"] > 0
    for name, causal in (
        ("student", True),
        ("teacher", None),
    ):  # as ComfyUI reads them: it knows no false one
        config = json.loads(open_weights(WEIGHTS / FILES[name]).metadata["config"])
        assert config["transformer"].get("causal_ar") is causal


def test_the_vae_returns_held_out_clips(demo: Demo) -> None:
    pixels, _ = clip_batch(range(4), "test", 33)
    assert psnr(demo.vae.decode(demo.vae.encode(pixels)), pixels) > 30
    summary = summarise(score(returned_clips(demo.vae, held_out(2)), held_out(2)))
    assert summary["colour"].mean > 95 and summary["total"].mean > 90


@torch.no_grad()
def test_the_tiny_decoder_draws_held_out_clips_as_the_vae_does(demo: Demo) -> None:
    assert (WEIGHTS / FILES["tiny"]).stat().st_size <= 200_000
    latents = demo.vae.encode(clip_batch(range(2), "test", 17)[0])
    whole, rough = (one.decode(latents).clamp(-1, 1) for one in (demo.vae, load_sprite_tiny()))
    assert psnr(rough, whole) > 25
    colours = F.interpolate(F.avg_pool3d(whole, (1, 8, 8)), size=whole.shape[2:])
    assert psnr(rough, whole) > psnr(colours, whole) + 2  # a map to one colour gives less still


def test_the_student_paints_what_its_prompt_says(demo: Demo) -> None:
    captions = held_out(6)
    clips = [*student_clips(demo.student, demo.text, demo.vae, captions)]
    right, others = (
        summarise(score(clips, texts)) for texts in (captions, [*captions[1:], captions[0]])
    )
    assert right["colour"].mean > others["colour"].mean + 20
    assert not math.isnan(right["total"].mean)


@torch.no_grad()
@pytest.mark.parametrize("shapes", [("star", "circle"), ("cross", "square")])
def test_the_words_decide_a_shape(demo: Demo, shapes: tuple[str, str]) -> None:
    """The teacher denoises a clip towards its prompt's shape: 1 is the right one, 0 another."""
    scenes = (sample_scene(seed, "test") for seed in count())
    alone = [
        scene
        for scene in islice(scenes, 60)
        if [body.stated.motion for body in scene.bodies] == ["bounce"]
    ][:4]
    latents, contexts = [], []
    for shape in shapes:
        seen = [replace(scene, bodies=(_as(scene.bodies[0], shape),)) for scene in alone]
        latents.append(
            demo.vae.encode(torch.stack([to_pixels(render(scene, 33)) for scene in seen]))
        )
        texts = [
            write((scene.bodies[0].stated,), None, scene.ground.name, np.random.default_rng(0)).text
            for scene in seen
        ]
        contexts.append(demo.teacher.text(demo.text(texts)))
    noise = torch.randn(latents[0].shape, generator=torch.Generator().manual_seed(1))
    sigma, apart = torch.full((len(alone),), 0.92), latents[0] - latents[1]
    noisy = add_noise(latents[0], noise, 0.92)
    shares = []
    for context in contexts:
        x0 = predict_x0(noisy, whole_flow(demo.teacher, noisy, sigma, context), 0.92)
        shares.append(((x0 - latents[1]) * apart).sum() / apart.square().sum())
    assert shares[0] > shares[1] + 0.25


def _as(body: Body, shape: str) -> Body:
    return replace(body, stated=replace(body.stated, shape=shape))


def test_generate_needs_no_file_but_the_bundle(tmp_path: Path, capsys) -> None:
    out = tmp_path / "x.mp4"
    prompt = (
        "a small red star bounces to the left of a green circle that stays still on a navy ground"
    )
    assert main(["generate", "--model", "sprites", "--prompt", prompt, "--out", str(out)]) == 0
    assert len(decoded(out)) == 81 and read_metadata(out)["prompt"] == prompt


def test_the_refiner_is_the_students(demo: Demo) -> None:
    path = WEIGHTS / REFINERS["sprites"]
    assert load_refiner(path)[1].base == fingerprint(load_sprite_network("student").model)
    assert path.stat().st_size <= 4 * 2**20
    captions = held_out(1)
    base, refined = (
        next(
            iter(
                student_clips(
                    demo.student, demo.text, demo.vae, captions, frames=6, refiner=refiner
                )
            )
        )
        for refiner in (None, bundled_refiner(demo.student))
    )
    assert base.shape == refined.shape and (base != refined).any()


def test_a_first_look_has_a_video_a_prompt_and_one_sheet(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(demo_show, "BATCH", 2)
    assert main(["demo", "show", "--clips", "1", "--out", str(tmp_path)]) == 0
    assert len(decoded(tmp_path / "sprites_1.mp4")) == 81
    assert (tmp_path / "sprites.png").exists()
    output = capsys.readouterr().out
    assert read_metadata(tmp_path / "sprites_1.mp4")["prompt"] in output
    assert "base: " in output and "refined: " in output
    assert float(re.search(r"\(base ([\d.]+), refined [\d.]+\)", output)[1]) < ENOUGH


def test_the_first_look_shows_the_first_captions_that_the_base_is_weak_at(monkeypatch) -> None:
    captions = held_out(2 * BATCH)
    totals = {caption.text: 90.0 for caption in captions}
    for place, total in ((3, 79.9), (5, 80.0), (BATCH, 10.0), (BATCH + 2, 0.0)):
        totals[captions[place].text] = total
    asked = []

    def clips_of(name: str, some: list[Caption]) -> list[str]:
        asked.append((name, some))
        return [f"{name} {caption.text}" for caption in some]  # in place of a clip

    monkeypatch.setattr(demo_show, "evaluate_clip", lambda clip, caption: totals[caption.text])
    monkeypatch.setattr(demo_show, "totals_of", lambda total: {"total": total})
    sampled = (partial(clips_of, name) for name in ("base", "refined"))
    shown = [*sampled, 2]
    pairs = demo_show.weak_pairs(*shown)
    weak = captions[3], captions[BATCH]
    assert [[judged.clip for judged in pair] for pair in pairs] == [
        [f"{name} {caption.text}" for name in ("base", "refined")] for caption in weak
    ]
    assert [[judged.total for judged in pair] for pair in pairs] == [[79.9] * 2, [10.0] * 2]
    assert asked == [
        (name, batch)
        for batch in (captions[:BATCH], captions[BATCH:])
        for name in ("base", "refined")
    ]
    monkeypatch.setattr(demo_show, "MOST_TRIED", BATCH)
    assert [pair[0].caption for pair in demo_show.weak_pairs(*shown)] == [captions[3]]


def test_a_pair_of_the_first_look_has_one_noise(demo: Demo) -> None:
    """A refiner of nothing gives the base's clip, wherever the weak caption is in its batch."""
    sampled = partial(student_clips, demo.student, demo.text, demo.vae, frames=6)
    silent = Control("shrunk", 0.0).refiner(demo.student, (750,))
    pairs = demo_show.weak_pairs(sampled, partial(sampled, refiner=silent), 3)
    assert [pair[0].caption for pair in pairs] != held_out(3)
    for base, refined in pairs:
        assert (base.clip == refined.clip).all() and base.caption == refined.caption


def test_quickstart_has_the_first_held_out_prompt_that_the_base_is_weak_at(demo: Demo) -> None:
    graph = json.loads((WORKFLOWS / "quickstart.json").read_text(encoding="utf-8"))
    prompt = graph["2"]["inputs"]["text"]
    seed = graph["4"]["inputs"]["seed"]
    for caption in held_out(3):
        (clip,) = student_clips(demo.student, demo.text, demo.vae, [caption], seed=seed)
        (scores,) = score([clip], [caption])
        if totals_of(scores)["total"] < ENOUGH:
            break
    assert (prompt, seed) == (caption.text, 0)  # of seed 0, that clip has the workflow's noise


def test_names_stand_on_plates_of_one_size() -> None:
    base, refined, better = (
        name_plate(*mark, 60) for mark in (("base", 1.0), ("refined", 1.0), ("refined", 88.8))
    )
    assert base.shape == refined.shape == better.shape and base.shape[0] == 60
    ink = [int((plate == 255).all(-1).sum()) for plate in (base, refined, better)]
    assert 0 < ink[0] < ink[1] < ink[2]
