"""Start images and start videos of the sampler node, and its recipe."""

from pathlib import Path

import pytest
import torch
from comfy_graphs import small
from standalone_runs import execute, refusal

from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.sampler import PathwiseRefinedSampler
from autorefiner.nodes.starts import covering, started_at
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.recipe import parse_recipe
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS, Preset
from autorefiner.refiner.wan.vae import normalized, raw_latents

SF, SIDE, SEED, LENGTH = PRESETS["self-forcing"], 32, 5, 21
STAR = "a red star circles on a navy ground"


@pytest.fixture
def demo(stand_ins) -> tuple:
    """Return the stand-ins' MODEL, CLIP and VAE."""
    return standalone.load_demo("student")


def frames_of(count: int, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(count))


def sampled(demo: tuple, **inputs: object) -> torch.Tensor:
    given = {"width": SIDE, "height": SIDE, "length": LENGTH, "batch_size": 1, "seed": SEED}
    given |= {"method": "self-forcing", "vae": demo[2]} | inputs
    positive = [[demo[1].context(STAR), {}]]
    return PathwiseRefinedSampler.execute(demo[0], positive, **given).args[0]["samples"]


def of_core(demo: tuple, preset: Preset = SF, frames: int = 6, **inputs: object) -> torch.Tensor:
    plan = RunPlan(preset, frames, SIDE // 8, SIDE // 8)
    chunks = sample(demo[0].network, demo[1].context(STAR), plan, seed=SEED, **inputs)
    return raw_latents(torch.cat(list(chunks), 2))


def test_start_images_are_what_their_encoded_latents_are(demo: tuple) -> None:
    images = frames_of(9)
    latents = {"samples": standalone.encode(demo[2], images)}
    assert torch.equal(sampled(demo, start=images), sampled(demo, start=latents))
    assert torch.equal(
        sampled(demo, start=images)[:, :, :3], raw_latents(normalized(latents["samples"]))
    )


def test_a_start_image_of_another_shape_is_scaled_and_cut(demo: tuple) -> None:
    wide = frames_of(1, 48, 96)
    cut = covering(wide, SIDE, SIDE)
    assert torch.equal(sampled(demo, start=wide), sampled(demo, start=cut))


@pytest.mark.parametrize("level", [1000, 750, 250])
def test_a_video_starts_chunks_at_a_level_of_the_preset(demo: tuple, level: int) -> None:
    video = frames_of(25)
    source = normalized(standalone.encode(demo[2], video[:LENGTH]))
    preset = SF.changed(levels=tuple(step for step in SF.levels if step <= level))
    expected = of_core(demo, preset, source=source)
    made = sampled(demo, start_video=video, start_level=level)
    assert torch.equal(made, expected)
    if level == 1000:
        assert torch.equal(made, sampled(demo))


def test_a_video_of_a_file_counts_as_its_frames(demo: tuple) -> None:
    frames = (frames_of(LENGTH) * 255).round() / 255
    video = standalone.VideoFile(frames=frames)
    assert torch.equal(
        sampled(demo, start_video=video, start_level=500),
        sampled(demo, start_video=frames, start_level=500),
    )


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"start_video": frames_of(20), "start_level": 500}, ["20", "21"]),
        ({"start_video": frames_of(21), "start_level": 600}, ["600", "750"]),
        ({"start_video": frames_of(21), "start_level": 500, "vae": None}, ["vae"]),
        ({"start": frames_of(1), "vae": None}, ["vae"]),
        ({"start": frames_of(3)}, ["3 images"]),
        ({"recipe": "reroll 9"}, ["chunks 1 to 2"]),
        ({"recipe": "extend 4000"}, ["16381"]),
        ({"recipe": "again"}, ["recipe"]),
    ],
)
def test_what_does_not_fit_is_refused(demo: tuple, inputs: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        sampled(demo, **inputs)
    assert all(word in str(refused.value) for word in words)


def test_every_chunk_keeps_a_level() -> None:
    preset = PRESETS["causal-forcing-2step"]
    assert started_at(preset, 500).first_levels == (500, 250)
    with pytest.raises(ValueError, match="without a level"):
        started_at(preset, 250)


def test_a_recipe_is_sampled_as_in_the_core(demo: tuple) -> None:
    recipe = "reroll 2 3; extend 1"
    noise = parse_recipe(recipe).noise(WhiteNoise(SEED))
    assert torch.equal(sampled(demo, recipe=recipe), of_core(demo, frames=9, noise=noise))
    assert sampled(demo, recipe="keep 1").shape[2] == 3


def test_covering_keeps_frames_of_the_size_and_the_middle_of_others() -> None:
    frames = frames_of(2)
    assert covering(frames, SIDE, SIDE) is frames
    stripes = torch.zeros(1, 16, 48, 3)
    stripes[:, :, 16:32] = 1
    assert covering(stripes, 16, 16).min() > 0.9
    assert covering(stripes, 32, 32).shape == (1, 32, 32, 3)


def test_a_recipe_that_cannot_be_read_is_refused_when_it_is_queued(base: Path) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"]["recipe"] = "again"
    assert "recipe" in refusal(graph, base)
    graph["3"]["inputs"] |= {"recipe": "keep 1", "length": 21}
    assert execute(graph, base)["3"][0]["samples"].shape[2] == 3
