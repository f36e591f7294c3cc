"""Noise belongs to its place in the run and to nothing else."""

import pytest
import torch

from autorefiner.refiner.noise.source import Draw, WhiteNoise
from autorefiner.refiner.schedule import Chunk

SHAPE = (1, 16, 3, 8, 8)


def chunk(start: int = 3, index: int = 1) -> Chunk:
    return Chunk(index, start, 3, ())


def test_the_same_place_draws_the_same_noise_whatever_else_is_drawn() -> None:
    first = WhiteNoise(7)(chunk(), Draw(1), SHAPE)
    torch.randn(5)
    source = WhiteNoise(7)
    source(chunk(0), Draw(0), SHAPE)
    assert torch.equal(source(chunk(index=9), Draw(1), SHAPE), first), "a run that starts later draws the same"


@pytest.mark.parametrize(
    "other",
    [
        WhiteNoise(8)(chunk(), Draw(1), SHAPE),
        WhiteNoise(7)(chunk(6), Draw(1), SHAPE),
        WhiteNoise(7)(chunk(), Draw(2), SHAPE),
        WhiteNoise(7)(chunk(), Draw(1, repeat=1), SHAPE),
        WhiteNoise(7)(chunk(), Draw(1, candidate=1), SHAPE),
    ],
    ids=["seed", "frame", "level", "repeat", "candidate"],
)
def test_another_place_draws_other_noise(other) -> None:
    assert (WhiteNoise(7)(chunk(), Draw(1), SHAPE) - other).abs().mean() > 0.5


def test_a_sample_of_a_batch_draws_what_it_draws_alone() -> None:
    batch = WhiteNoise(7)(chunk(), Draw(0), (3, *SHAPE[1:]))
    assert torch.equal(batch[:1], WhiteNoise(7)(chunk(), Draw(0), SHAPE))
    assert torch.equal(batch[1:], WhiteNoise(7, first=1)(chunk(), Draw(0), (2, *SHAPE[1:])))
    assert (batch[0] - batch[1]).abs().mean() > 0.5


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    noise = WhiteNoise(7)(chunk(), Draw(0), (1, 16, 3, 64, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(noise.mean().item()) < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_the_number_of_threads_does_not_matter() -> None:
    threads, drawn = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            drawn.append(WhiteNoise(7)(chunk(), Draw(0), (1, 16, 3, 64, 64)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)
