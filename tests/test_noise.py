"""Noise depends on its place in the run and on nothing else."""

import hashlib
import struct

import pytest
import torch

from autorefiner.refiner.noise.source import Draw, GivenNoise, WhiteNoise
from autorefiner.refiner.schedule import PRESETS, Chunk, plan_chunks

SHAPE = (1, 16, 3, 8, 8)


def chunk(start: int = 3, index: int = 1) -> Chunk:
    return Chunk(index, start, 3, ())


def test_the_same_place_draws_the_same_noise_whatever_else_is_drawn() -> None:
    first = WhiteNoise(7)(chunk(), Draw(750), SHAPE)
    torch.randn(5)
    source = WhiteNoise(7)
    source(chunk(0), Draw(1000), SHAPE)
    assert torch.equal(source(chunk(index=9), Draw(750), SHAPE), first), (
        "a run that starts later draws the same"
    )


@pytest.mark.parametrize(
    "other",
    [
        WhiteNoise(8)(chunk(), Draw(750), SHAPE),
        WhiteNoise(7)(chunk(6), Draw(750), SHAPE),
        WhiteNoise(7)(chunk(), Draw(500), SHAPE),
        WhiteNoise(7)(chunk(), Draw(750, repeat=1), SHAPE),
        WhiteNoise(7)(chunk(), Draw(750, candidate=1), SHAPE),
    ],
    ids=["seed", "frame", "step", "repeat", "candidate"],
)
def test_another_place_draws_other_noise(other) -> None:
    assert (WhiteNoise(7)(chunk(), Draw(750), SHAPE) - other).abs().mean() > 0.5


def test_a_sample_of_a_batch_draws_what_it_draws_alone() -> None:
    batch = WhiteNoise(7)(chunk(), Draw(1000), (3, *SHAPE[1:]))
    assert torch.equal(batch[:1], WhiteNoise(7)(chunk(), Draw(1000), SHAPE))
    assert torch.equal(batch[1:], WhiteNoise(7, first=1)(chunk(), Draw(1000), (2, *SHAPE[1:])))
    assert (batch[0] - batch[1]).abs().mean() > 0.5


def test_the_key_of_a_stream_is_the_documented_one() -> None:
    """blake2b over seed, sample, latent frame, nominal step, repeat, candidate (64-bit LE)."""
    digest = hashlib.blake2b(struct.pack("<6q", 7, 2, 3, 750, 1, 4), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    drawn = WhiteNoise(7, first=2)(chunk(), Draw(750, repeat=1, candidate=4), SHAPE)
    assert torch.equal(drawn[0], torch.randn(SHAPE[1:], generator=generator))


def test_precomputed_noise_is_found_by_its_step_whatever_levels_a_chunk_has() -> None:
    preset, white = PRESETS["causal-forcing-2step"], WhiteNoise(3)
    chunks = plan_chunks(preset, 3)[1]
    given = GivenNoise.of(white, chunks, (1, 16, 4, 4))
    assert given.steps == (1000, 750, 500, 250)
    for each in chunks:
        for level in each.levels:
            draw, shape = Draw(level.step), (1, 16, each.length, 4, 4)
            assert torch.equal(given(each, draw, shape), white(each, draw, shape))
    assert given(chunks[1], Draw(750), (1, 16, 1, 4, 4)).abs().max() == 0, (
        "that chunk lacks the level"
    )
    assert GivenNoise.of(white, chunks, (1, 16, 4, 4), last=500).steps == (1000, 750, 500)
    with pytest.raises(ValueError, match="steps"):
        GivenNoise(given.noise, given.steps[:2])


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    noise = WhiteNoise(7)(chunk(), Draw(1000), (1, 16, 3, 64, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(noise.mean().item()) < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_the_number_of_threads_does_not_matter() -> None:
    threads, drawn = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            drawn.append(WhiteNoise(7)(chunk(), Draw(1000), (1, 16, 3, 64, 64)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)
