"""Legible latents: means by cell, visible shapes, latents moved between cells."""

import numpy as np
import pytest
import torch

from autorefiner.refiner.demo.recipes.legible import (
    Reader,
    by_latent,
    linear_shares,
    picture_of,
    shown,
)
from autorefiner.refiner.demo.recipes.vae import (
    VaeOptions,
    latent_shape,
    moved_latents,
    moved_pixels,
    training_crops,
)
from autorefiner.refiner.demo.render import render, render_parts
from autorefiner.refiner.demo.shapes import SHAPES
from autorefiner.refiner.demo.world import sample_scene


def passing() -> int:
    """The seed of a scene whose first object passes in front of the second."""
    return next(seed for seed in range(400) if sample_scene(seed).caption.relation == "front")


def test_the_video_is_the_one_that_is_rendered() -> None:
    scene = sample_scene(passing())
    parts = render_parts(scene, 33)
    assert np.array_equal(parts.video, render(scene, 33))
    there = [name for name, part in zip(SHAPES, parts.shapes, strict=True) if part.any()]
    assert set(there) == {body.stated.shape for body in scene.bodies}


def test_the_parts_make_up_the_video() -> None:
    parts = render_parts(sample_scene(passing()), 33)
    composed = parts.colour + (1 - parts.shapes.sum(axis=0)) * parts.ground
    assert np.abs(composed.transpose(1, 2, 3, 0) - parts.video).max() < 2  # rounded once a layer


def test_what_another_object_hides_is_not_seen() -> None:
    scene = sample_scene(passing())
    assert len({body.stated.shape for body in scene.bodies}) == 2
    behind = list(SHAPES).index(next(body.stated.shape for body in scene.bodies if body.depth == 1))
    shapes = render_parts(scene, 161).shapes
    area = shapes[behind].sum(axis=(1, 2))
    assert area.min() < 0.97 * area.max()
    assert shapes.sum(axis=0).max() <= 1 + 1e-6


def test_means_by_latent_are_of_its_own_frames_and_cell() -> None:
    frames = torch.zeros(1, 2, 9, 16, 16)
    frames[0, 1, 5:7, 8:, :8] = (
        1  # the first half of the last latent's frames, in its lower left cell
    )
    whole, halves = by_latent(frames, 8), by_latent(frames, 8, times=2)
    assert whole.shape == (1, 2, 3, 2, 2) and halves.shape == (1, 4, 3, 2, 2)
    assert whole[0, 1, 2, 1, 0] == 0.5 and whole.sum() == 0.5
    assert halves[0, 2, 2, 1, 0] == 1 and halves.sum() == 1


def test_the_first_frame_is_a_latent_of_its_own() -> None:
    frames = torch.rand(2, 3, 5, 8, 8)
    halves = by_latent(frames, 8, times=2).unflatten(1, (3, 2))
    assert torch.allclose(halves[:, :, 0, 0], frames[:, :, 0].mean((2, 3), keepdim=True))
    assert torch.equal(halves[:, :, 0, 0], halves[:, :, 1, 0])
    assert picture_of(frames).shape == (2, 96, 2, 1, 1)


def test_latents_that_hold_the_facts_are_read_without_error() -> None:
    clips = [shown(sample_scene(seed), 5) for seed in range(24)]
    pixels, facts = (torch.stack(part) for part in zip(*clips, strict=True))
    latents = torch.zeros(24, 16, 2, 8, 8)
    latents[:, :12] = by_latent(facts, 8)
    reader = Reader().requires_grad_(False)
    for part in reader.parameters():
        part.zero_()
    reader.facts.weight[range(12), range(12)] = 1
    reader.which.weight[range(6), range(6)] = 1000
    losses = reader(latents, pixels, facts)
    assert (
        max(losses["covers"], losses["colours"]) < 1e-10
        and losses["which"] < 1e-3
        and losses["picture"] > 0.01
    )
    shares = linear_shares(latents, facts)
    assert (shares["covers"], shares["colours"]) == pytest.approx((1, 1))
    assert max(linear_shares(torch.randn(latents.shape), facts).values()) < 0.2


@pytest.mark.parametrize("by", [(3, 5), (7, 1)])
def test_moved_latents_are_of_moved_pixels(by) -> None:
    """Latents are linear in the position, like the means of a ramp."""
    down, right = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    pixels = (2 * down + right).expand(1, 3, 5, 24, 32)
    latents, shifted = (
        moved_latents(by_latent(pixels, 8), torch.tensor(by) / 8),
        moved_pixels(pixels, by),
    )
    assert latent_shape(3, shifted) == latents.shape
    assert latents.shape[-2:] == (2, 3) and shifted.shape[-2:] == (16, 24)
    assert torch.allclose(latents, by_latent(shifted, 8))


def test_crops_are_of_one_length_a_step_and_show_objects() -> None:
    options = VaeOptions(batch=2)
    for index, (count, frames) in enumerate(((7, 9), (2, 33))):
        pixels, facts = training_crops(options, index)
        assert pixels.shape == (count, 3, frames, 40, 40) and facts.shape == (
            count,
            12,
            frames,
            40,
            40,
        )
        assert facts[:, :6, 0].sum((1, 2, 3)).min() > 10
    assert torch.equal(training_crops(options, 1)[0], pixels)
