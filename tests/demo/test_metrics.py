"""The metrics: truth scores 100, planted faults lower their row, wrong captions score chance."""

import itertools
from collections.abc import Callable
from dataclasses import astuple, replace

import numpy as np
import pytest

from autorefiner.refiner.demo.clips import held_out, score, truth_clips
from autorefiner.refiner.demo.metrics.action import see_action
from autorefiner.refiner.demo.metrics.classify import blur
from autorefiner.refiner.demo.metrics.diversity import diversity
from autorefiner.refiner.demo.metrics.evaluate import (
    QUALITY,
    ROWS,
    SEMANTIC,
    ClipScores,
    evaluate_clip,
)
from autorefiner.refiner.demo.metrics.semantic import Semantic, semantic_rows
from autorefiner.refiner.demo.metrics.table import (
    TOTALS,
    format_table,
    paired_difference,
    summarise,
    with_totals,
)
from autorefiner.refiner.demo.metrics.track import find, in_front
from autorefiner.refiner.demo.palette import GROUND_COLOURS
from autorefiner.refiner.demo.render import Layer, draw, draw_ground, layers, render
from autorefiner.refiner.demo.scene import Scene
from autorefiner.refiner.demo.world import realise, sample_scene

CLIPS, FAULTY = 64, 10
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed, "test") for seed in range(CLIPS)]


@pytest.fixture(scope="module")
def videos(scenes) -> list[np.ndarray]:
    return [render(scene) for scene in scenes]


@pytest.fixture(scope="module")
def truth_scores(scenes, videos) -> list[ClipScores]:
    return [
        evaluate_clip(video, scene.caption) for scene, video in zip(scenes, videos, strict=True)
    ]


def means(scores: list[ClipScores]) -> dict[str, float]:
    return {name: interval.mean for name, interval in summarise(scores).items()}


def redraw(
    scene: Scene, change: Callable[[list[Layer]], list[Layer]], frames: int = 81
) -> np.ndarray:
    """The scene with its objects changed."""
    top, bottom = (GROUND_COLOURS[tone] for tone in scene.ground.tones)
    drawn = change(layers(scene, scene.times(frames)))
    return draw(draw_ground(top, bottom, scene.ground.split, scene.size), drawn, frames)


def levels(values: np.ndarray) -> np.ndarray:
    return np.round(np.clip(values, 0, 255)).astype(np.uint8)


def by_frame(values: np.ndarray) -> np.ndarray:
    return np.asarray(values)[:, None, None, None]


def freeze(scene: Scene, video: np.ndarray) -> np.ndarray:
    return video[np.minimum(np.arange(len(video)), 16)]


def flicker(scene: Scene, video: np.ndarray) -> np.ndarray:
    return levels(video * by_frame(np.where(np.arange(len(video)) % 2, 1.05, 0.95)))


def colour_drift(scene: Scene, video: np.ndarray) -> np.ndarray:
    return levels(video + by_frame(np.linspace(0, 1, len(video))) * (24, -8, -16))


def blurred(scene: Scene, video: np.ndarray) -> np.ndarray:
    return blur(video, 1.5)


def teleport(scene: Scene, video: np.ndarray) -> np.ndarray:
    def jump(layer: Layer) -> Layer:
        places = layer.position.copy()
        places[40:] += np.where(places[40] > 0.5, -0.25, 0.25)
        return replace(layer, position=places)

    return redraw(scene, lambda drawn: [jump(layer) for layer in drawn])


def vanish(scene: Scene, video: np.ndarray) -> np.ndarray:
    def gone(drawn: list[Layer]) -> list[Layer]:
        front = drawn[-1]
        return [
            *drawn[:-1],
            replace(front, radius=np.where(np.arange(len(front.radius)) < 40, front.radius, 0)),
        ]

    return redraw(scene, gone)


def swap_colours(scene: Scene, video: np.ndarray) -> np.ndarray:
    return redraw(
        scene,
        lambda drawn: [
            replace(a, colour=b.colour) for a, b in itertools.pairwise([*drawn, drawn[0]])
        ],
    )


def grid(scene: Scene, video: np.ndarray) -> np.ndarray:
    lines = np.zeros(video.shape[1:3])
    lines[::8], lines[:, ::8] = 12, 12
    return levels(video + lines[None, :, :, None])


def duplicate(scene: Scene, video: np.ndarray) -> np.ndarray:
    """A second object of the first's kind, in a corner that is free."""
    layer = layers(scene, scene.times(1))[-1]
    corners = np.array([[0.15, 0.15], [0.85, 0.15], [0.15, 0.85], [0.85, 0.85]])
    ways = np.concatenate([drawn.position for drawn in layers(scene, scene.times(len(video)))])
    corner = corners[np.linalg.norm(ways - corners[:, None], axis=2).min(axis=1).argmax()]
    still = {"position": np.tile(corner, (len(video), 1)), "radius": np.full(len(video), 0.09)}
    return redraw(
        scene, lambda drawn: [replace(layer, angle=np.zeros(len(video)), **still), *drawn]
    )


FAULTS = {
    # fault: its row, and the row's highest allowed score
    freeze: ("dynamic", 40),
    flicker: ("flicker", 50),
    colour_drift: ("drift", 60),
    blurred: ("imaging", 80),
    teleport: ("smoothness", 60),
    vanish: ("subject", 80),
    swap_colours: ("colour", 50),
    grid: ("imaging", 80),
    duplicate: ("count", 10),
}


def test_truth_has_full_marks_in_every_row(truth_scores):
    summary = means(truth_scores)
    assert min(summary[name] for name in (*ROWS, *TOTALS)) >= 97, summary


@pytest.mark.parametrize(
    ("split", "size", "frames", "clips"),
    [("test", 128, 81, 6), ("test", 96, 81, 6), ("train", 64, 321, 5)],
)
def test_truth_has_full_marks_at_other_sizes_and_lengths(split, size, frames, clips):
    scenes = [sample_scene(seed, split, size) for seed in range(100, 100 + clips)]
    summary = means([evaluate_clip(render(scene, frames), scene.caption) for scene in scenes])
    assert min(summary[name] for name in ROWS) >= 97, summary


def test_unseen_pairs_have_full_marks_too():
    scenes = [sample_scene(seed, "composition") for seed in range(12)]
    summary = means([evaluate_clip(render(scene), scene.caption) for scene in scenes])
    assert min(summary[name] for name in ROWS) >= 97, summary


def test_objects_are_found_where_the_truth_has_them(scenes, videos):
    for scene, video in zip(scenes[:24], videos, strict=False):
        truth, detections = scene.truth(81), find(video)
        assert detections.backdrop.name == scene.ground.name
        if len(set(scene.ground.tones)) == 2:
            assert abs(detections.backdrop.split - scene.ground.split) < 0.005
        assert sorted(track.colour for track in detections.tracks) == sorted(truth.colour)
        for track in detections.tracks:
            index = truth.colour.index(track.colour)
            assert track.shape == truth.shape[index]
            assert (track.present | track.hidden).all() and track.known.sum() > 20
            off = np.abs(track.position - truth.position[:, index])[track.known] * 64
            assert off.max() < 1.2 and np.median(off) < 0.1
            assert np.median(np.abs(track.radius / truth.radius[:, index] - 1)[track.known]) < 0.02
            if len(scene.bodies) == 1 and scene.bodies[0].motion.kind == "spin":
                turned = truth.angle[:, index] - truth.angle[0, index]
                assert np.abs(track.angle - track.angle[0] - turned).max() < 0.05
        if scene.caption.relation in ("behind", "front"):
            assert (
                detections.tracks[in_front(detections.tracks)[0, 1]].colour
                == truth.colour[truth.depth.index(0)]
            )


def test_what_a_vae_does_to_pixels_costs_no_meaning(scenes, videos, truth_scores):
    """Blurred a little, with noise that gives about 30 dB."""
    rng = np.random.default_rng(0)
    worn = [levels(blur(video, 0.6) + rng.normal(0, 8, video.shape)) for video in videos[:20]]
    off = np.concatenate(
        [(a.astype(float) - b).ravel() for a, b in zip(worn, videos, strict=False)]
    )
    assert 28 < 20 * np.log10(255 / np.sqrt((off**2).mean())) < 31
    summary = means(
        [evaluate_clip(video, scene.caption) for video, scene in zip(worn, scenes, strict=False)]
    )
    truth = means(truth_scores)
    for name in SEMANTIC:
        assert summary[name] >= truth[name] - 3, (name, summary[name])
    assert summary["imaging"] < 80


def test_captions_of_other_clips_score_chance(scenes, videos):
    """The count's chance is how often two captions agree in number; other rows are below 30."""
    detections = [find(video) for video in videos[:40]]
    pairs = [(i, j) for i, j in itertools.permutations(range(40), 2) if (i - j) % 4 == 1]
    rows = np.array([astuple(semantic_rows(detections[i], scenes[j].caption)) for i, j in pairs])
    chance = Semantic(*np.nanmean(rows, axis=0))
    alike = np.mean([len(scenes[i].bodies) == len(scenes[j].bodies) for i, j in pairs])
    assert chance.count == pytest.approx(100 * alike, abs=1)
    assert max(chance.object, chance.colour, chance.relation, chance.action) < 30, chance


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_lowers_its_own_row(fault, scenes, videos, truth_scores):
    row, most = FAULTS[fault]
    chosen = [
        index
        for index, scene in enumerate(scenes)
        if len(scene.bodies) == 2 or fault is not swap_colours
    ]
    chosen = chosen[:FAULTY]
    scores = [
        evaluate_clip(fault(scenes[index], videos[index]), scenes[index].caption)
        for index in chosen
    ]
    summary, before = means(scores), means([truth_scores[index] for index in chosen])
    assert summary[row] <= most and summary[row] <= before[row] - 20, summary
    same_kind = QUALITY if row in QUALITY else SEMANTIC
    if fault is not vanish:  # which takes what moves, and the last chunk's object, with it
        assert min(same_kind, key=summary.__getitem__) == row, summary
    else:
        assert summary["count"] < 65 and summary["drift"] < 65, summary
    untouched = {
        freeze: ("flicker", "imaging"),
        flicker: ("smoothness", "dynamic"),
        colour_drift: ("smoothness",),
    }
    untouched |= {
        blurred: ("background", "dynamic"),
        teleport: ("flicker", "colour"),
        swap_colours: QUALITY,
    }
    for name in untouched.get(fault, ()):
        assert summary[name] > 97, (name, summary[name])


def test_time_and_mirror_turn_the_action_round(scenes, videos):
    seen = 0
    opposite = {"clockwise": "counterclockwise", "counterclockwise": "clockwise"}
    for scene, video in zip(scenes, videos, strict=True):
        motion = scene.bodies[0].motion
        if motion.kind not in ("orbit", "spin") or len(scene.bodies) > 1:
            continue
        for changed in (video[::-1], video[:, :, ::-1]):
            action = see_action(find(np.ascontiguousarray(changed)).tracks[0])
            assert (action.kind, action.direction) == (motion.kind, opposite[motion.direction])
            seen += 1
    assert seen >= 8


def test_three_times_slower_is_slow(scenes, videos):
    fast = [index for index, scene in enumerate(scenes) if scene.bodies[0].motion.speed == "fast"][
        :8
    ]
    actions = []
    for index in fast:
        tracks = find(videos[index][np.arange(81) // 3]).tracks
        colour = scenes[index].bodies[0].stated.colour
        actions += [see_action(track) for track in tracks if track.colour == colour]
    assert len(actions) == 8
    assert sum(action.speed == "slow" for action in actions) >= 7


def test_nothing_there_scores_nothing(scenes, videos):
    empty = np.repeat(videos[0][:, :, :1], 64, axis=2)
    scores = evaluate_clip(empty, scenes[0].caption)
    assert scores.object == scores.count == scores.action == 0
    assert scores.subject == scores.dynamic == scores.smoothness == scores.imaging == 0
    noise = np.random.default_rng(0).integers(0, 256, videos[0].shape, dtype=np.uint8)
    scores = evaluate_clip(noise, scenes[0].caption)
    assert scores.object == scores.action == 0 and scores.imaging < 5 and scores.flicker < 5


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((81, 64, 64, 3), np.float32), "frames float32"),
        (np.zeros((81, 64, 48, 3), np.uint8), "square frames"),
        (np.zeros((9, 64, 64, 3), np.uint8), "at least 16"),
        (np.zeros((81, 20, 20, 3), np.uint8), "a frame side of 20"),
    ],
)
def test_wrong_frames_say_what_to_give(frames, message):
    with pytest.raises(ValueError, match=message):
        find(frames)


def scores_of(**rows: float) -> ClipScores:
    return ClipScores(**(dict.fromkeys(ROWS, 80.0) | rows))


def test_totals_are_weighted_as_vbench_weighs_them():
    summary = means(
        [
            scores_of(dynamic=0, object=30, relation=np.nan),
            scores_of(dynamic=0, object=50, relation=np.nan),
        ]
    )
    assert summary["object"] == 40
    assert summary["quality"] == pytest.approx(80 * 6 / 6.5)
    assert summary["semantic"] == pytest.approx((40 + 3 * 80) / 4)
    assert summary["total"] == pytest.approx((4 * summary["quality"] + summary["semantic"]) / 5)
    assert with_totals(np.full(12, 50.0))[-1] == 50


def test_intervals_are_reproducible_and_wider_for_captions_drawn_together():
    rng = np.random.default_rng(1)
    scores = [scores_of(action=float(value)) for value in rng.normal(60, 15, 40).repeat(2)]
    alone, grouped = (
        summarise(scores)["action"],
        summarise(scores, [i // 2 for i in range(80)])["action"],
    )
    assert alone == summarise(scores)["action"]
    assert alone.low < alone.mean < alone.high and alone.mean == pytest.approx(grouped.mean)
    assert 3.0 < alone.high - alone.low < 9.0  # 2 · 1.96 · 15 / √80 = 6.6
    assert grouped.high - grouped.low > 1.2 * (alone.high - alone.low)


def test_a_paired_difference_leaves_out_what_the_captions_share():
    rng = np.random.default_rng(2)
    first = [scores_of(action=float(value)) for value in rng.normal(60, 15, 60)]
    second = [replace(score, action=score.action + float(rng.normal(2, 1))) for score in first]
    assert all(
        interval.low == interval.high == 0 for interval in paired_difference(first, first).values()
    )
    gain = paired_difference(second, first)["action"]
    assert 1.5 < gain.low < gain.mean < gain.high < 2.5
    with pytest.raises(ValueError, match=r"60 .* 59"):
        paired_difference(first, first[1:])
    with pytest.raises(ValueError, match="no scores"):
        summarise([])
    with pytest.raises(ValueError, match="2 groups"):
        summarise(first, [0, 1])


def test_a_table_is_aligned_and_complete(truth_scores):
    lines = format_table(
        {"truth": summarise(truth_scores), "again": summarise(truth_scores[:9])}
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == [*ROWS, *TOTALS]
    assert "| 100.0 (100.0 to 100.0) |" in lines[2]


def test_diversity_is_that_of_the_world_or_none(scenes):
    captions = [scene.caption for scene in scenes[:8] for _ in range(3)]
    worlds = [render(realise(caption, 50 + index % 3)) for index, caption in enumerate(captions)]
    assert diversity(worlds, captions) > 80
    assert diversity([worlds[index - index % 3] for index in range(24)], captions) == 0
    with pytest.raises(ValueError, match="two seeds"):
        diversity(worlds[::3], captions[::3])


@pytest.mark.parametrize("seed", range(8))
def test_any_frames_at_all_have_scores(seed):
    """As of an untrained model: blocks that come, go, touch and change colour, and plain noise."""
    rng = np.random.default_rng(seed)
    clip = np.empty((17, 64, 64, 3), np.uint8)
    clip[:] = rng.integers(0, 256, 3)
    for _ in range(4):
        top, left = rng.integers(0, 50, 2)
        for index in np.flatnonzero(rng.random(17) < 0.8):
            height, width = rng.integers(4, 24, 2)
            top, left = (
                int(np.clip(place + step, 0, 50))
                for place, step in zip((top, left), rng.integers(-4, 5, 2), strict=True)
            )
            clip[index, top : top + height, left : left + width] = rng.integers(0, 256, 3)
    if seed == 7:
        clip = rng.integers(0, 256, clip.shape).astype(np.uint8)
    scores = evaluate_clip(clip, sample_scene(seed, "test").caption).array
    assert np.nanmin(scores) >= 0
    assert np.nanmax(scores) <= 100


def test_clips_are_scored_alike_by_other_processes() -> None:
    captions = held_out(2)
    alone, helped = (
        score(truth_clips(captions, frames=17), captions, workers=workers) for workers in (0, 1)
    )
    assert np.array_equal(
        [one.array for one in alone], [one.array for one in helped], equal_nan=True
    )
