"""The sprites' reward: contradictions of captions and clips, and the model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autorefiner.refiner.demo.bundle import load_sprite_reward, save_model
from autorefiner.refiner.demo.captions import Caption, Stated
from autorefiner.refiner.demo.recipes.contradict import changed, changes, draw_change, twin
from autorefiner.refiner.demo.recipes.facts import FACTS, facts_of
from autorefiner.refiner.demo.recipes.reward import (
    ATTRIBUTES,
    VISIBLE,
    RewardOptions,
    RewardStage,
    clips_of,
    make_batch,
    worn,
)
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
    batch = make_batch(options, 0)
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
