"""The synthetic world is deterministic, fits its captions, and shows all that they state."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autorefiner.refiner.demo.captions import SHAPE_WORDS, unlike_captions, vocabulary, words
from autorefiner.refiner.demo.motion import RATES, WALL
from autorefiner.refiner.demo.palette import OBJECT_COLOURS
from autorefiner.refiner.demo.recipes.text import TextOptions
from autorefiner.refiner.demo.render import clip_batch, render, to_pixels
from autorefiner.refiner.demo.scene import Scene
from autorefiner.refiner.demo.shapes import SHAPES
from autorefiner.refiner.demo.world import (
    HELD_OUT_ACTS,
    HELD_OUT_LOOKS,
    SPLITS,
    TURN_GAP,
    realise,
    sample_scene,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed) for seed in range(1500)]


def with_relation(scenes: list[Scene], *names: str | None) -> list[Scene]:
    return [scene for scene in scenes if len(scene.bodies) == 2 and scene.caption.relation in names]


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_is_one_clip_whatever_else_is_drawn(split):
    first = sample_scene(7, split)
    np.random.seed(3)
    torch.manual_seed(3)
    sample_scene(8, split)
    again = sample_scene(7, split)
    assert again == first
    assert render(again).tobytes() == render(first).tobytes()
    assert sample_scene(8, split) != first


def test_a_seed_keeps_its_meaning():
    """Evaluation sets are lists of seeds: other captions would change every published number."""
    texts = [sample_scene(0, split).caption.text for split in ("train", "test")]
    assert texts == [
        "a green star spins counterclockwise slowly to the left of a white "
        "box that quickly swells and shrinks on a navy background",
        "on a backdrop of gray over olive a small yellow cross moves down "
        "and passes behind a small purple square that stays still",
    ]


def test_splits_are_different_streams(scenes):
    train = {scene.bodies for scene in scenes[:300]}
    assert not train & {sample_scene(seed, "test").bodies for seed in range(300)}


def test_a_clip_is_the_beginning_of_a_longer_one():
    for seed in range(8):
        scene = sample_scene(seed)
        assert (render(scene, 81) == render(scene, 200)[:81]).all()


def test_size_scales_the_picture_and_not_the_truth():
    for seed in range(8):
        small, large = sample_scene(seed, size=64), sample_scene(seed, size=128)
        assert small.bodies == large.bodies and small.caption == large.caption
        video = render(large, 9).astype(float)
        assert video.shape == (9, 128, 128, 3)
        halved = video.reshape(9, 64, 2, 64, 2, 3).mean(axis=(2, 4))
        assert np.abs(halved - render(small, 9)).mean() < 1.5
        assert (render(small, 9, 128) == video).all()


def test_pixels_are_where_the_truth_says(scenes):
    checked = 0
    for scene in scenes[:60]:
        truth, video = scene.truth(81), render(scene)
        for index, (shape, colour) in enumerate(zip(truth.shape, truth.colour, strict=True)):
            whole = truth.visible[:, index] > 0.999
            if shape == "ring" or not whole.any():
                continue
            x, y = (truth.position[whole, index] * 64).astype(int).T
            assert (video[whole, y, x] == OBJECT_COLOURS[colour]).all()
            checked += int(whole.sum())
    assert checked > 3000


def test_held_out_pairs_are_in_composition_only(scenes):
    def pairs(scene: Scene) -> set:
        stated = [body.stated for body in scene.bodies]
        return {(one.shape, one.colour) for one in stated} | {
            (one.colour, one.motion) for one in stated
        }

    held_out = HELD_OUT_LOOKS | HELD_OUT_ACTS
    seen = set().union(*(pairs(scene) for scene in scenes))
    assert not seen & held_out
    assert not any(pairs(sample_scene(seed, "test")) & held_out for seed in range(300))
    composition = [pairs(sample_scene(seed, "composition")) for seed in range(300)]
    assert all(each & held_out for each in composition)
    assert held_out <= set().union(*composition)
    everything = {(shape, colour) for shape in SHAPES for colour in OBJECT_COLOURS}
    assert everything - HELD_OUT_LOOKS <= seen


def test_captions_use_the_whole_vocabulary_and_nothing_else(scenes):
    used = {word for scene in scenes for word in words(scene.caption.text)}
    assert used == set(vocabulary())
    assert max(len(words(scene.caption.text)) for scene in scenes) <= TextOptions().text_len


def test_a_caption_states_what_is_there_in_its_words(scenes):
    for scene in scenes:
        text = scene.caption.text
        for stated, body in zip(scene.caption.objects, scene.bodies, strict=True):
            left_out = {
                name: None
                for name in ("size", "direction", "speed")
                if getattr(stated, name) is None
            }
            assert stated == replace(body.stated, **left_out)
            assert any(word in words(text) for word in SHAPE_WORDS[stated.shape])
        assert scene.caption.ground in (None, scene.ground.name)


def test_what_cannot_be_seen_is_in_no_caption(scenes):
    for scene in scenes:
        bodies = [body.stated for body in scene.bodies]
        assert len({stated.colour for stated in bodies}) == len(bodies)
        assert all(stated.motion != "spin" or SHAPES[stated.shape].symmetry for stated in bodies)
        assert all(
            stated.size is None for stated in scene.caption.objects if stated.motion == "pulse"
        )
        assert any(stated.motion != "still" for stated in bodies)


def test_relations_hold_at_all_times(scenes):
    for scene in with_relation(scenes, "left", "right", "above", "below")[:80]:
        truth = scene.truth(321)
        axis = int(scene.caption.relation in ("above", "below"))
        sign = 1 if scene.caption.relation in ("left", "above") else -1
        reach = truth.radius * [SHAPES[shape].reach for shape in truth.shape]
        assert (
            sign * (truth.position[:, 1, axis] - truth.position[:, 0, axis]) > reach.sum(axis=1)
        ).all()


def test_only_what_passes_is_ever_hidden(scenes):
    for scene in with_relation(scenes, None, "left", "right", "above", "below")[:60]:
        truth = scene.truth(321)
        reach = truth.radius * [SHAPES[shape].reach for shape in truth.shape]
        distance = np.linalg.norm(truth.position[:, 0] - truth.position[:, 1], axis=1)
        assert (distance > reach.sum(axis=1)).all() and (truth.visible == 1).all()
    for scene in with_relation(scenes, "behind", "front")[:30]:
        truth, back = scene.truth(81), int(scene.caption.relation == "front")
        assert truth.depth[back] == 1 and truth.depth[1 - back] == 0
        assert (truth.visible[:, 1 - back] == 1).all()
        assert truth.visible[:, back].min() < 0.7 and truth.visible[:, back].max() > 0.999


def test_everything_stays_in_the_frame(scenes):
    for scene in scenes[:150]:
        truth = scene.truth(321)
        reach = truth.radius * [SHAPES[shape].reach for shape in truth.shape]
        nearest = np.minimum(truth.position, 1 - truth.position).min(axis=2) - reach
        assert nearest.min() > WALL - 1e-6
        for index, body in enumerate(scene.bodies):
            if body.motion.kind == "orbit":
                assert nearest[:, index].min() > TURN_GAP - 1e-6


def test_directions_and_speeds_are_those_of_the_truth(scenes):
    seen = set()
    for scene in scenes:
        for body in scene.bodies:
            path = body.path(scene.times(81))
            step = np.diff(path.position, axis=0)
            motion, first = body.motion, step[:4].sum(axis=0)
            if motion.kind == "bounce":
                x, y = (
                    ("left", "", "right")[int(np.sign(first[0])) + 1],
                    ("up", "", "down")[int(np.sign(first[1])) + 1],
                )
                assert f"{y} {x}".strip() == motion.direction
                low, high = RATES["bounce"][motion.speed]
                assert low - 1e-6 <= np.median(np.hypot(*step.T)) * 16 <= high + 1e-6
            elif motion.kind == "orbit":
                turn = step[:-1, 0] * step[1:, 1] - step[:-1, 1] * step[1:, 0]
                assert (turn > 0).all() == (motion.direction == "clockwise")
            elif motion.kind == "spin":
                assert (np.diff(path.angle) > 0).all() == (motion.direction == "clockwise")
            seen.add((motion.kind, motion.direction, motion.speed))
    assert len(seen) == 16 + 4 + 4 + 2 + 4 + 1


def test_a_caption_can_be_realised_again_and_otherwise(scenes):
    for scene in scenes[:40]:
        first, second = realise(scene.caption, 1), realise(scene.caption, 2)
        assert first == realise(scene.caption, 1) and first.bodies != second.bodies
        for stated, body in zip(scene.caption.objects, first.bodies, strict=True):
            left_out = {
                name: None
                for name in ("size", "direction", "speed")
                if getattr(stated, name) is None
            }
            assert stated == replace(body.stated, **left_out)
        assert scene.caption.ground in (None, first.ground.name)
        if scene.caption.relation == "left":
            assert (first.truth(81).position[:, 0, 0] < first.truth(81).position[:, 1, 0]).all()


def test_a_batch_holds_the_clips_of_its_seeds():
    pixels, captions = clip_batch([3, 5], "test", frames=9, size=32)
    assert pixels.shape == (2, 3, 9, 32, 32) and pixels.dtype == torch.float32
    assert captions == [sample_scene(seed, "test").caption for seed in (3, 5)]
    frames = render(sample_scene(5, "test"), 9, 32)
    assert torch.equal(pixels[1], to_pixels(frames))
    assert torch.equal(
        ((pixels[1] + 1) * 127.5).round().byte().permute(1, 2, 3, 0), torch.from_numpy(frames)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_scene(0, "validation"), "'validation'"),
        (lambda: sample_scene(-1), "seed -1 is negative"),
        (lambda: sample_scene(0, size=60), "side of 60"),
        (lambda: render(sample_scene(0), 81, 256), "a frame side of 256"),
        (lambda: render(sample_scene(0), 0), "0 frames"),
    ],
)
def test_wrong_input_says_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_caption_that_does_not_fit_says_so(scenes):
    scene = next(scene for scene in scenes if len(scene.bodies) == 2)
    wide = replace(
        scene.caption.objects[0], motion="bounce", direction="right", size="large", shape="star"
    )
    caption = replace(scene.caption, objects=(wide, wide), relation="left")
    with pytest.raises(ValueError, match="fit"):
        realise(caption, 0)


def test_no_caption_is_unlike_captions_and_others_are_told() -> None:
    assert not [
        warning
        for seed in range(300)
        for warning in unlike_captions(sample_scene(seed).caption.text)
    ]
    warnings = unlike_captions(
        "a small red star bounces to the left of a green circle on a blue ground"
    )
    assert warnings[0].startswith("the sprites have no blue ground: theirs are black, grey")
    assert warnings[1:] == [
        "the circle has no motion: say one of each object, as 'that stays still'"
    ]
    assert unlike_captions("a star") and not unlike_captions("")
