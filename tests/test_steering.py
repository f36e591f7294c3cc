"""Rerolled chunks, chunks that start from another clip, and recipes."""

import hashlib
import struct

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.cli import main
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.noise.source import Draw, RerolledNoise, WhiteNoise
from autorefiner.refiner.noise.sources import NOISES
from autorefiner.refiner.recipe import Recipe, parse_recipe
from autorefiner.refiner.rollout import add_noise
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import SAMPLERS
from autorefiner.refiner.schedule import PRESETS, Chunk, Preset
from autorefiner.refiner.timeline import Flush, Keep, Recache, Scene, Timeline
from autorefiner.refiner.wan.transformer import WanConfig

from tiny import tiny_network
from tiny_command import command, write_files

CONFIG = WanConfig(dim=128, num_heads=2, ffn_dim=64, num_layers=1, text_dim=32, text_len=8)
SF = PRESETS["self-forcing"]
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(2))
FRAMES, SIZE = 12, (4, 4)
GIVEN = Chunk(0, 0, 3, ())


@pytest.fixture(scope="module")
def network():
    return tiny_network(CONFIG)


def plan_of(frames: int = FRAMES, given: int = 0, preset: Preset = SF) -> RunPlan:
    return RunPlan(preset, frames, *SIZE, given=given)


def run(network, plan: RunPlan | None = None, context=CONTEXT, **options) -> Tensor:
    return torch.cat(list(sample(network, context, plan or plan_of(), **options)), 2)


def clip_of(frames: int, seed: int = 3) -> Tensor:
    return torch.randn(1, 16, frames, *SIZE, generator=torch.Generator().manual_seed(seed))


def test_the_take_enters_the_key_of_a_stream_where_it_is_not_0() -> None:
    chunk, shape = Chunk(1, 3, 3, ()), (1, 16, 3, *SIZE)
    assert torch.equal(
        WhiteNoise(7)(chunk, Draw(750), shape), WhiteNoise(7)(chunk, Draw(750, take=0), shape)
    )
    digest = hashlib.blake2b(struct.pack("<7q", 7, 0, 3, 750, 0, 0, 2), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    drawn = WhiteNoise(7)(chunk, Draw(750, take=2), shape)
    assert torch.equal(drawn[0], torch.randn(shape[1:], generator=generator))


def test_takes_of_several_rerolls_add_up_from_each_chunk_on() -> None:
    takes = []
    noise = RerolledNoise(lambda chunk, draw, shape: takes.append(draw.take), ((2, 1), (1, 3)))
    for index in range(4):
        noise(Chunk(index, 3 * index, 3, ()), Draw(750), ())
    assert takes == [0, 3, 4, 4]


def test_a_reroll_changes_its_chunk_and_all_later_ones(network) -> None:
    before = run(network)
    after = run(network, noise=parse_recipe("reroll 3").noise(WhiteNoise(0)))
    assert torch.equal(after[:, :, :6], before[:, :, :6])
    assert (after[:, :, 6:9] - before[:, :, 6:9]).abs().max() > 1e-3
    assert (after[:, :, 9:] - before[:, :, 9:]).abs().max() > 1e-3
    again = parse_recipe("reroll 3; reroll 4").noise(WhiteNoise(0))
    assert torch.equal(run(network, noise=again)[:, :, :9], after[:, :, :9])


@pytest.mark.parametrize("name", [name for name in NOISES if name != "white"])
def test_a_reroll_changes_the_noise_of_every_kind_from_its_chunk_on(name: str) -> None:
    shape = (1, 16, 3, *SIZE)
    chunks = plan_of(30).chunks
    before = NOISES[name]()(WhiteNoise(0), 3)
    after = NOISES[name]()(parse_recipe("reroll 9").noise(WhiteNoise(0)), 3)
    draw = Draw(1000)
    same = [torch.equal(before(chunk, draw, shape), after(chunk, draw, shape)) for chunk in chunks]
    assert same == [True] * 8 + [False] * 2


@pytest.mark.parametrize(
    "text, frames",
    [
        ("", 12), ("reroll 3", 12), ("keep 2", 6), ("keep 2; extend 3", 15), ("extend 1", 15),
        ("keep 9", 12), (" reroll 4 2 ;; keep 4 ", 12), ("extend 1; reroll 5", 15),
    ],
)  # fmt: skip
def test_a_recipe_says_how_long_the_clip_is(text: str, frames: int) -> None:
    recipe = parse_recipe(text)
    assert recipe.frames(plan_of()) == frames
    assert parse_recipe(str(recipe)) == recipe


def test_an_extension_fills_up_a_shorter_last_chunk_first() -> None:
    assert parse_recipe("extend 1").frames(plan_of(8)) == 11
    alone = Preset(SF.levels, True, 5.0, 3, first_alone=True)
    assert parse_recipe("keep 1; extend 2").frames(plan_of(9, preset=alone)) == 7
    assert parse_recipe("extend 1").frames(plan_of(3, given=1)) == 7


@pytest.mark.parametrize(
    "text",
    ["reroll", "reroll 0", "reroll 5; stop 3", "keep 2 2", "reroll 3 99999", "reroll ٣", "-1"],
)
def test_what_is_no_command_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="recipe"):
        parse_recipe(text)


@pytest.mark.parametrize("text", ["reroll 1", "keep 1", "reroll 6", "keep 2; reroll 3"])
def test_only_new_chunks_can_be_rerolled_or_ended_with(text: str) -> None:
    with pytest.raises(ValueError, match="chunks 2 to"):
        parse_recipe(text).frames(plan_of(given=3))


def test_an_endless_run_has_no_recipe() -> None:
    plan = RunPlan(SF.changed(window=12), None, *SIZE)
    with pytest.raises(ValueError, match="endless"):
        parse_recipe("keep 2").frames(plan)


def test_without_a_reroll_the_noise_is_the_same_object() -> None:
    white = WhiteNoise(0)
    assert Recipe().noise(white) is white and parse_recipe("extend 2").noise(white) is white


@pytest.mark.parametrize("method", SAMPLERS)
def test_from_pure_noise_the_source_does_not_matter(network, method: str) -> None:
    options = dict(method=SAMPLERS[method](), seed=4)
    plain = run(network, **options)
    assert torch.equal(run(network, source=clip_of(FRAMES), **options), plain)


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_chunk_starts_from_the_source_under_the_noise_of_its_first_level(
    network, method: str
) -> None:
    preset, source, inputs = SF.changed(levels=(500, 250)), clip_of(FRAMES + 3), {}
    plan = plan_of(preset=preset)
    forward = network.model.patch_embedding.forward

    def record(x: Tensor) -> Tensor:
        inputs.setdefault(len(inputs), x)
        return forward(x)

    network.model.patch_embedding.forward = record
    try:
        run(network, plan, source=source, seed=4, method=SAMPLERS[method]())
    finally:
        del network.model.patch_embedding.forward
    chunk = plan.chunks[0]
    level = chunk.levels[0]
    noise = WhiteNoise(4)(chunk, Draw(500), (1, 16, 3, *SIZE))
    expected = add_noise(source[:, :, :3], noise, level.sigma)
    assert torch.equal(inputs[0][:, :, :3], expected)


def test_a_low_level_stays_close_to_the_source(network) -> None:
    source = clip_of(FRAMES)
    near = run(network, plan_of(preset=SF.changed(levels=(20,))), source=source)
    far = run(network, plan_of(preset=SF.changed(levels=(750,))), source=source)
    assert (near - source).abs().mean() < (far - source).abs().mean() / 3


@pytest.mark.parametrize("source", [clip_of(FRAMES - 1), clip_of(FRAMES)[:, :8]])
def test_a_source_that_does_not_fit_is_refused(network, source: Tensor) -> None:
    with pytest.raises(ValueError, match="start chunks from"):
        run(network, source=source)
    with pytest.raises(ValueError, match="NaN"):
        run(network, source=clip_of(FRAMES) * torch.inf)


def test_an_endless_run_starts_from_no_clip(network) -> None:
    plan = RunPlan(SF.changed(window=12), None, *SIZE)
    with pytest.raises(ValueError, match="endless"):
        next(sample(network, CONTEXT, plan, source=clip_of(FRAMES)))


@pytest.mark.parametrize("transition", [Keep(), Recache(6), Flush(1)])
@pytest.mark.parametrize("first", [3, 6, 9])
def test_a_clip_goes_on_from_its_first_chunks_bit_for_bit(network, transition, first: int) -> None:
    """As a run does whose first chunks are held on the server."""
    timeline = Timeline((Scene(0, CONTEXT), Scene(6, OTHER, transition)))
    noise, source = parse_recipe("reroll 4").noise(WhiteNoise(0)), clip_of(FRAMES)
    options = dict(context=timeline, noise=noise, source=source)
    preset = SF.changed(levels=(750, 250))
    whole = run(network, plan_of(preset=preset), **options)
    rest = plan_of(FRAMES - first, first, preset)
    later = run(network, rest, initial=whole[:, :, :first], **options)
    assert torch.equal(later, whole[:, :, first:])


def test_generate_samples_a_recipe(tmp_path) -> None:
    files = write_files(tmp_path)
    clips = {}
    for name, recipe in (("whole", ""), ("other", "reroll 3; keep 3; extend 1")):
        out = tmp_path / f"{name}.mp4"
        assert main([*command(files, out, "--save-latents"), "--recipe", recipe]) == 0
        clips[name], metadata = read_latents(out.with_suffix(".latents.safetensors"))
    assert clips["other"].shape[2] == clips["whole"].shape[2] + 3
    assert torch.equal(clips["other"][:, :, :6], clips["whole"][:, :, :6])
    assert not torch.equal(clips["other"][:, :, 6:9], clips["whole"][:, :, 6:])
    assert (metadata["recipe"], metadata["frames"]) == ("reroll 3; keep 3; extend 1", "45")
