"""The sprites' reward: contradictions of captions and clips, and the model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autorefiner.refiner.demo.bundle import load_sprite_reward, load_sprite_vae, save_model
from autorefiner.refiner.demo.captions import Caption, Stated
from autorefiner.refiner.demo.recipes import failures
from autorefiner.refiner.demo.recipes.contradict import changed, changes, draw_change, twin
from autorefiner.refiner.demo.recipes.facts import FACTS, facts_of
from autorefiner.refiner.demo.recipes.failures import Failures
from autorefiner.refiner.demo.recipes.reward import (
    ATTRIBUTES,
    VISIBLE,
    RewardOptions,
    RewardStage,
    clips_of,
    make_batch,
    worn,
)
from autorefiner.refiner.demo.recipes.vae import psnr
from autorefiner.refiner.demo.render import render
from autorefiner.refiner.demo.reward_model import SpriteVideoText
from autorefiner.refiner.demo.shapes import SHAPES
from autorefiner.refiner.demo.world import sample_scene
from autorefiner.refiner.training.rewards.reward import scored

RED = Stated("star", "red", "spin", speed="slow")
BLUE = Stated("circle", "blue", "still")


def said(caption: Caption) -> dict[str, object]:
    """Return everything that a caption states, by unique names."""
    stated = {"relation": caption.relation, "ground": caption.ground}
    for place, one in enumerate(caption.objects):
        stated |= {f"{place}.{name}": getattr(one, name) for name in Stated.__slots__}
    return stated


def test_every_change_is_of_one_attribute_that_was_said() -> None:
    caption = Caption("", (RED, BLUE), "left", "navy")
    possible = changes(caption)
    assert {name for _, name, _ in possible} == {
        "shape",
        "colour",
        "motion",
        "speed",
        "relation",
        "ground",
    }
    assert (-1, "relation", "right") in possible
    assert {value for place, name, value in possible if (place, name) == (0, "shape")} == {
        "square",
        "triangle",
        "cross",
    }
    assert "blue" not in {
        value for place, name, value in possible if (place, name) == (0, "colour")
    }
    before = said(caption)
    for change in possible:
        place, name, value = change
        after = said(changed(caption, change, np.random.default_rng(0)))
        different = {key for key in before if before[key] != after[key]}
        key = name if place < 0 else f"{place}.{name}"
        assert after[key] == value
        assert different - {f"{place}.speed"} == {key} if name == "motion" else different == {key}
    assert draw_change(caption, np.random.default_rng(0), frozenset({"size"})) is None
    assert {
        name for _, name, _ in (draw_change(caption, np.random.default_rng(i)) for i in range(60))
    } == {name for _, name, _ in possible}


def test_a_twin_shows_the_change_and_nothing_else_of_the_caption() -> None:
    rng, names = np.random.default_rng(0), set()
    for seed in range(40):
        scene = sample_scene(seed)
        change = draw_change(scene.caption, rng, VISIBLE)
        other = twin(scene, change, changed(scene.caption, change, rng), rng)
        names.add(change[1])
        assert not np.array_equal(render(other, 25), render(scene, 25))
        stated = [
            (body.stated, one)
            for body, one in zip(other.bodies, other.caption.objects, strict=True)
        ]
        for full, partial in stated:
            assert all(
                getattr(partial, name) in (None, getattr(full, name)) for name in Stated.__slots__
            )
            assert full.motion != "spin" or SHAPES[full.shape].symmetry
        assert other.caption.ground in (None, other.ground.name)
    assert names == VISIBLE


def test_a_batch_holds_scenes_and_twins_at_the_same_times() -> None:
    options = RewardOptions(batch=3)
    batch = make_batch(options, None, 0)
    assert batch.frames.shape == (*batch.numbers.shape, 3, 64, 64)
    assert len(batch.frames) == 6
    assert torch.equal(batch.numbers[::2], batch.numbers[1::2])
    assert (batch.frames[::2] != batch.frames[1::2]).any(dim=(1, 2, 3, 4)).all()
    assert len(set(batch.true) | set(batch.false)) == 12
    seen = worn(batch.frames, options, torch.Generator().manual_seed(0))
    assert 0.005 < (seen - batch.frames).abs().mean() < 0.1
    assert torch.equal(
        worn(batch.frames, replace(options, noise=0.0, blur=0.0), torch.Generator()), batch.frames
    )


def failures_of(*seeds: int) -> Failures:
    """Return failures whose true clips are of one grey each, and whose failed ones are brighter."""
    grey = np.arange(10, 10 + len(seeds), dtype=np.uint8)[:, None, None, None, None]
    moving = np.arange(81, dtype=np.uint8)[:, None, None, None]
    true = np.broadcast_to(grey + moving, (len(seeds), 81, 64, 64, 3))
    return Failures(list(seeds), true, true + 100)


def test_a_batch_ends_with_scenes_that_the_student_failed_at() -> None:
    known, options = failures_of(7, 8, 9), RewardOptions(batch=4)
    batch = make_batch(options, known, 3)
    assert len(batch.frames) == len(batch.true) == 8 and len(batch.failed) == 2
    for place, failed in zip((4, 6), batch.failed, strict=True):  # the last scenes, before a twin
        numbers = batch.numbers[place].tolist()
        assert max(numbers) < 81
        number = round(255 * batch.frames[place, 0].mean().item()) - 10 - numbers[0]
        true = torch.from_numpy(known.true[number][numbers].copy()).permute(0, 3, 1, 2) / 255
        assert torch.equal(batch.frames[place], true)
        assert torch.allclose(failed, true + 100 / 255, atol=1e-6)
        caption = sample_scene(known.seeds[number]).caption
        assert torch.equal(batch.said[0][place], facts_of(caption.objects, caption.ground)[0])
    assert len(make_batch(options, failures_of(7), 3).failed) == 1
    plain, without = (make_batch(options, None, 3), replace(options, failed=0.0))
    assert plain.failed is None
    assert torch.equal(plain.frames, make_batch(without, known, 3).frames)


def test_a_failed_clip_is_pushed_away_from_its_caption() -> None:
    options = RewardOptions(batch=2, learning_rate=0.3)
    stage = RewardStage(options, torch.device("cpu"), failures_of(7, 8))
    batch, model = stage.batches(0), stage.learner.model.model

    @torch.no_grad()
    def margin() -> float:
        """Return how much better than the failed clip the true one fits."""
        frames = torch.cat((batch.frames[2:3], batch.failed))
        video = model.embed_video(frames, batch.numbers[2:3])
        fits = video @ model.embed_text(batch.true[2:3]).T
        return float(fits[0] - fits[1])

    before = margin()
    for _ in range(4):
        stage.step(0)
    assert margin() > before + 0.05


def test_failures_are_the_clips_that_miss_their_captions(tmp_path, monkeypatch) -> None:
    clip = np.zeros((5, 64, 64, 3), np.uint8)
    monkeypatch.setattr(failures, "FRAMES", 5)
    monkeypatch.setattr(failures, "student_clips", lambda *models, **_: [clip] * len(models[-1]))
    monkeypatch.setattr(failures, "evaluate_clip", lambda *_: None)
    semantic = iter([90.0, 10.0, 60.0, 59.0, *[0.0] * 60])
    monkeypatch.setattr(failures, "totals_of", lambda _: {"semantic": next(semantic)})
    found = failures.sample_failures(None, None, load_sprite_vae(), 2)
    assert found.seeds == [failures.FIRST + 1, failures.FIRST + 3]
    assert found.true.shape == found.failed.shape == (2, 5, 64, 64, 3)
    truth = render(sample_scene(failures.FIRST + 1), 5)
    assert psnr(*(torch.from_numpy(one) / 127.5 - 1 for one in (found.true[0], truth))) > 25
    found.write(tmp_path)
    again = Failures.read(tmp_path)
    assert again.seeds == found.seeds and (again.true == found.true).all()
    assert Failures.read(tmp_path / "none") is None


def test_a_student_that_fails_nowhere_is_said(monkeypatch) -> None:
    tried = []
    monkeypatch.setattr(
        failures, "student_clips", lambda *models, **_: tried.append(models[-1]) or models[-1]
    )
    monkeypatch.setattr(failures, "evaluate_clip", lambda *_: None)
    monkeypatch.setattr(failures, "totals_of", lambda _: {"semantic": 100.0})
    monkeypatch.setattr(failures, "MOST_TRIED", 10)
    with pytest.raises(ValueError, match="none of 20 captions"):
        failures.sample_failures(None, None, load_sprite_vae(), 2)
    assert [len(captions) for captions in tried] == [16, 4]


def test_frames_of_a_clip_are_those_of_the_whole_one() -> None:
    scene = sample_scene(3)
    frames, numbers = clips_of([scene], [(0, 5, 12)])
    assert numbers.tolist() == [[0, 5, 12]]
    whole = torch.from_numpy(render(scene, 13)).permute(0, 3, 1, 2) / 255
    assert torch.equal(frames[0], whole[[0, 5, 12]])


def test_steps_on_one_batch_lower_its_loss() -> None:
    stage = RewardStage(
        RewardOptions(batch=1, learning_rate=0.3), torch.device("cpu")
    )  # a hundredth of it at step 0
    logged = [stage.step(0) for _ in range(6)]
    assert logged[-1]["loss"] + logged[-1]["facts"] < 0.8 * (logged[0]["loss"] + logged[0]["facts"])


def test_the_model_comes_back_from_a_file_and_leads_to_its_frames(tmp_path) -> None:
    torch.manual_seed(0)
    model, numbers = SpriteVideoText(), (0, 8, 16)
    scenes = [sample_scene(0), sample_scene(1)]
    frames, places = clips_of(scenes, [numbers, numbers])
    captions = [scene.caption.text for scene in scenes]
    assert save_model(tmp_path, "reward", model, None, {"steps": 10}).stat().st_size <= 4 * 2**20
    reward = load_sprite_reward(tmp_path)
    frames.requires_grad_(True)
    scores = scored(reward, frames, numbers, captions)
    with torch.no_grad():
        expected = (model.embed_video(frames, places) * model.embed_text(captions)).sum(1)
    assert torch.allclose(scores, expected, atol=0.02)  # of bf16
    scores.sum().backward()
    assert frames.grad.abs().sum(dim=(2, 3, 4)).gt(0).all()
    assert all(parameter.grad is None for parameter in reward.model.parameters())


def test_facts_are_what_is_said_and_nothing_of_colours_that_are_not_there() -> None:
    holds, known = facts_of([RED, BLUE], None)
    assert {FACTS[i] for i in holds.nonzero().flatten()} == {
        ("red", "shape", "star"), ("red", "motion", "spin"), ("red", "speed", "slow"),
        ("blue", "shape", "circle"), ("blue", "motion", "still"),
    }  # fmt: skip
    unknown = {FACTS[i][:2] for i in (1 - known).nonzero().flatten()}
    assert unknown == {("", "ground"), ("red", "direction"), ("red", "size")} | {
        ("blue", name) for name in ("direction", "speed", "size")
    }


def test_a_frames_time_is_told_to_the_model() -> None:
    torch.manual_seed(0)
    model, frames = SpriteVideoText(), torch.rand(1, 3, 3, 64, 64)
    early, late = (
        model.embed_video(frames, torch.tensor(numbers)) for numbers in ((0, 3, 6), (30, 33, 36))
    )
    assert not torch.allclose(early, late)
    assert torch.allclose(early, model.embed_video(frames, torch.tensor([[0, 3, 6]])))
    assert torch.allclose(early.norm(dim=-1), torch.ones(1))


def test_without_its_file_the_reward_says_what_to_do(tmp_path) -> None:
    with pytest.raises(ValueError, match="demo train reward"):
        load_sprite_reward(tmp_path)


def test_all_attributes_are_asked_about() -> None:
    assert frozenset({"relation", *VISIBLE}) == frozenset(ATTRIBUTES)
