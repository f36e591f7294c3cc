"""Prompt Timeline: the samplers switch prompts as the core does, and refuse other lists."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from comfy_graphs import node, small
from standalone_runs import refusal

from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.prompt_timeline import EXAMPLE, PromptTimeline
from autorefiner.nodes.rewards import LoadReward
from autorefiner.nodes.sampler import PathwiseRefinedSampler
from autorefiner.refiner.prompt_timeline import parse_timeline, place_sections
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS, Chunk
from autorefiner.refiner.training.rewards.verifier import RewardJudge

PRESET, SIDE, SEED = PRESETS["self-forcing"], 4, 5
FRAMES = 12  # latent frames: chunks start at pixel frames 0, 9, 21 and 33
STAR, BOX = "a red star circles on a navy ground", "a green box rests on a gray ground"
TEXT = f"0s {STAR}\nf10 {{}}: {BOX}"  # the switch is at frame 21
TRANSITIONS = ["keep", "recache", "recache 3", "flush 1"]


@pytest.fixture
def demo(stand_ins) -> tuple:
    """Return the stand-ins' MODEL, CLIP and VAE."""
    return standalone.load_demo("student")


def scenes(demo: tuple, text: str) -> list:
    return PromptTimeline.execute(demo[1], text).args[0]


def sampled(demo: tuple, positive: Sequence, **inputs: object) -> torch.Tensor:
    inputs = {"batch_size": 1, "length": 4 * FRAMES - 3} | inputs
    inputs = {"method": "self-forcing", "seed": SEED} | inputs
    size = {"width": 8 * SIDE, "height": 8 * SIDE}
    return PathwiseRefinedSampler.execute(demo[0], positive, **size, **inputs).args[0]["samples"]


def of_core(demo: tuple, text: str, plan: RunPlan, **inputs: object) -> torch.Tensor:
    """Return the raw latents that the core samples for a timeline."""
    timeline = place_sections(parse_timeline(text), plan).timeline.map(demo[1].context)
    chunks = sample(demo[0].network, timeline, plan, seed=SEED, **inputs)
    return standalone.raw_latents(torch.cat(list(chunks), 2))


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_a_timeline_samples_what_it_does_in_the_core(transition: str, demo: tuple) -> None:
    text = TEXT.format(transition)
    latents = sampled(demo, scenes(demo, text))
    assert torch.equal(latents, of_core(demo, text, RunPlan(PRESET, FRAMES, SIDE, SIDE)))
    plain = sampled(demo, [[demo[1].context(STAR), {}]])
    assert torch.equal(latents[:, :, :6], plain[:, :, :6])
    assert not torch.equal(latents[:, :, 6:9], plain[:, :, 6:9])


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("chunks", [2, 3])
def test_a_clip_that_a_recipe_ends_is_the_beginning_of_the_whole(
    chunks: int, transition: str, demo: tuple
) -> None:
    """With 2 chunks it ends before the second scene."""
    positive = scenes(demo, TEXT.format(transition))
    kept = sampled(demo, positive, recipe=f"keep {chunks}")
    assert torch.equal(kept, sampled(demo, positive)[:, :, : 3 * chunks])
    again = sampled(demo, positive, recipe=f"keep {chunks}; extend {4 - chunks}")
    assert torch.equal(again, sampled(demo, positive))


@pytest.mark.parametrize("recipe, frames", [("keep 2", 6), ("keep 3", 9), ("extend 3", 12)])
def test_a_recipe_moves_no_equal_parts(recipe: str, frames: int, demo: tuple) -> None:
    """The second one begins with chunk 4 of 4."""
    positive = scenes(demo, f"{STAR} | {BOX}")
    whole, steered = (sampled(demo, positive, recipe=text) for text in ("", recipe))
    assert torch.equal(steered[:, :, :frames], whole[:, :, :frames])


def test_a_scene_after_the_end_of_a_whole_clip_is_refused(demo: tuple) -> None:
    with pytest.raises(ValueError, match="last chunk"):
        sampled(demo, scenes(demo, TEXT.format("keep")), length=21, recipe="reroll 2")


def test_one_scene_is_the_plain_prompt(demo: tuple) -> None:
    plain = sampled(demo, [[demo[1].context(STAR), {}]])
    assert torch.equal(sampled(demo, scenes(demo, STAR)), plain)


def test_a_batch_follows_the_timeline(demo: tuple) -> None:
    positive = scenes(demo, TEXT.format("keep"))
    one, two = (sampled(demo, positive, batch_size=batch) for batch in (1, 2))
    torch.testing.assert_close(two[:1], one, atol=1e-4, rtol=1e-4)


def test_times_count_from_the_start_of_an_extended_clip(demo: tuple) -> None:
    text = TEXT.format("keep")
    whole = sampled(demo, scenes(demo, text))
    start = {"samples": whole[:, :, :9]}
    extended = sampled(demo, scenes(demo, text), start=start)
    torch.testing.assert_close(extended, whole, atol=1e-4, rtol=1e-4)


def test_equal_prompts_share_a_context(demo: tuple) -> None:
    first, second, third = scenes(demo, "0s a red star\n1s a blue ring\n2s a red star")
    assert first[0] is third[0] and not torch.equal(first[0], second[0])


def test_the_nodes_say_the_scenes_and_where_they_begin(demo: tuple, capsys) -> None:
    positive = scenes(demo, TEXT.format("keep"))
    assert f"2 scenes: 0s {STAR}; f10 keep: {BOX}" in capsys.readouterr().err
    sampled(demo, positive)
    assert "f10 -> chunk 3, frame 21 (1.3 s), keep" in capsys.readouterr().err


def test_a_search_judges_each_chunk_by_its_scene(demo: tuple, monkeypatch) -> None:
    judged = []

    def score(judge: RewardJudge, x0: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        judged.append((chunk.index, judge.verifier.prompts_of(chunk)))
        return torch.zeros(len(x0))

    monkeypatch.setattr(RewardJudge, "score", score)
    (reward,) = LoadReward.execute("sprites", "bundled", 1.0, 0, 0).args
    inputs = {"method": "best-of-n", "reward": reward, "vae": demo[2], "candidates": 2}
    sampled(demo, scenes(demo, TEXT.format("keep")), **inputs)
    assert dict(judged) == {0: [STAR], 1: [STAR], 2: [BOX], 3: [BOX]}


def test_a_method_that_takes_all_chunks_at_once_is_refused(demo: tuple, monkeypatch) -> None:
    monkeypatch.setattr(standalone, "sample", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="hiar"):
        sampled(demo, scenes(demo, TEXT.format("keep")), method="hiar")


@pytest.mark.parametrize(
    "combine",
    [
        lambda star, scenes: star + star,
        lambda star, scenes: star + scenes,
        lambda star, scenes: scenes + star,
        lambda star, scenes: scenes + scenes,
        lambda star, scenes: scenes[1:],
        lambda star, scenes: scenes[::-1],
        lambda star, scenes: [],
    ],
)
def test_other_lists_of_entries_are_refused(combine, demo: tuple) -> None:
    star = [[demo[1].context(STAR), {}]]
    with pytest.raises(ValueError, match="Prompt Timeline"):
        sampled(demo, combine(star, scenes(demo, TEXT.format("keep"))))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("0s a star\n80 a box", "80"), ("5s a star", "0s"), ("", "empty"),
        ("0s a star\n5s recache 0: a box", "recache"),
    ],
)  # fmt: skip
def test_a_bad_text_is_refused_before_anything_is_loaded(
    text: str, word: str, base: Path, monkeypatch
) -> None:
    monkeypatch.setattr(standalone, "load_demo", lambda network: pytest.fail("loaded"))
    graph = small("text_to_video")
    graph["2"] = node("AutoRefinerPromptTimeline", clip=["1", 1], text=text)
    message = refusal(graph, base)
    assert word in message and "node 2" in message


@pytest.mark.parametrize("text", ["0s a star\n9s a box", "0s a star\nf1 a box\nf2 a ring"])
def test_scenes_that_do_not_fit_the_clip_are_refused_before_it_runs(
    text: str, demo: tuple, monkeypatch
) -> None:
    monkeypatch.setattr(standalone, "sample", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="chunk"):
        sampled(demo, scenes(demo, text))


def test_the_example_on_the_node_can_be_read() -> None:
    assert PromptTimeline.validate_inputs(EXAMPLE) is True
    assert PromptTimeline.validate_inputs() is True
    assert len(parse_timeline(EXAMPLE)) == 3
