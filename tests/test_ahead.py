"""Batches that are prepared ahead equal those prepared on demand."""

import os
from functools import partial

import pytest
import torch

from autorefiner.refiner.demo.recipes.data import shard_part
from autorefiner.refiner.demo.render import clip_batch
from autorefiner.refiner.training.ahead import Ahead, helpers


def made(factor: int, index: int) -> tuple[int, int]:
    """Return a product and the id of the process that computed it."""
    return factor * index, os.getpid()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_their_indices(workers) -> None:
    ahead = Ahead(partial(made, 10), end=6, workers=workers)
    asked = [2, 3, 4, 2, 5, 5, 7]  # from the middle, in order, back, on, again, past the end
    found = [ahead(index) for index in asked]
    assert [value for value, _ in found] == [10 * index for index in asked]
    assert [process == os.getpid() for _, process in found] == 6 * [not workers] + [True]


def test_a_model_on_the_cpu_keeps_all_cores() -> None:
    assert helpers(torch.device("cpu")) == 0
    assert helpers(torch.device("cuda")) > 0


def test_parts_of_a_shard_are_its_clips_in_order() -> None:
    shard, at_once = 5, 4
    parts = torch.cat([shard_part(shard, at_once, index)[:, :, 0] for index in (2, 3)])
    assert torch.equal(parts, clip_batch(range(shard, 2 * shard), frames=1)[0][:, :, 0])
