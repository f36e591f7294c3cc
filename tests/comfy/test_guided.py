"""Sampling with ComfyUI's NOISE, SIGMAS and seed."""

from dataclasses import replace

import pytest
import torch
from demo_files import random_pairs

from autorefiner.nodes.guided import FRESH_NOISE, SEEDS, CoreNoise, SamplerOptions, levels_of
from autorefiner.nodes.options import CacheOptions, ChunkSchedule
from autorefiner.nodes.refiner_plan import RefinerLora
from autorefiner.nodes.run import ModelFacts, Run, plan_run
from autorefiner.refiner.memory.policies import TopFrames
from autorefiner.refiner.noise.file import RefinerCard
from autorefiner.refiner.noise.source import Draw, WhiteNoise
from autorefiner.refiner.schedule import PRESETS, plan_chunks
from autorefiner.refiner.wan.vae import normalized, raw_latents

from tiny import TINY, tiny_network

SIGMAS = torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0])  # shift 5, four simple steps
SHAPE = (1, 7, 4, 4)
CPU = torch.device("cpu")
FACTS = ModelFacts(TINY, torch.float32, None, 1 << 30)
REFINER = RefinerLora(
    "a.refiner.safetensors", random_pairs(TINY), RefinerCard(rank=2), form="merged"
)


def made(run: Run) -> torch.Tensor:
    network = tiny_network()
    context = torch.randn(1, 8, network.config.text_dim, generator=torch.Generator().manual_seed(1))
    return run.clip(network, context, CPU, torch.float32)


def white(seed: int) -> torch.Tensor:
    """Return NOISE that starts every chunk as the seed itself would."""
    source, (_, chunks) = WhiteNoise(seed), plan_chunks(PRESETS["self-forcing"], SHAPE[1])
    return torch.cat(
        [source(chunk, Draw(1000), (1, 16, chunk.length, *SHAPE[2:])) for chunk in chunks], 2
    )


@pytest.mark.parametrize("name", [None, "self-forcing"])
def test_the_sigmas_of_self_forcing_sample_what_its_preset_does(name: str | None) -> None:
    expected = made(Run(plan_run(PRESETS["self-forcing"], SHAPE, None), 3, "self-forcing"))
    found = made(
        SamplerOptions("self-forcing").run(replace(FACTS, preset=name), white(3), SIGMAS, 3)
    )
    # Sigmas are not rounded to the preset's table.
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_the_noise_of_comfyuis_sampler_is_drawn_without_the_global_generator() -> None:
    chunk = plan_chunks(PRESETS["self-forcing"], 7)[1][1]
    torch.manual_seed(9 + 1000 * 1 + 2)
    expected = torch.randn(1, 16, 3, 4, 4)
    before = torch.get_rng_state()
    assert torch.equal(CoreNoise(9, CPU)(chunk, Draw(250), (1, 16, 3, 4, 4)), expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fresh", FRESH_NOISE)
def test_every_repeat_and_candidate_has_noise_of_its_own_and_the_first_is_the_runs(
    fresh: str,
) -> None:
    run = SamplerOptions("self-forcing", fresh).run(FACTS, white(3), SIGMAS, 5)
    chunk, shape = plan_chunks(PRESETS["self-forcing"], 7)[1][0], (1, 16, 3, 4, 4)
    repeats = [Draw(750, repeat=1), Draw(750, repeat=2)]
    draws = [Draw(1000), Draw(750), *repeats, Draw(1000, candidate=1), Draw(750, candidate=1)]
    drawn = [run.noise(chunk, draw, shape) for draw in draws]
    assert torch.equal(drawn[0], white(3)[:, :, :3])
    assert not any(torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])


def test_any_seed_of_noise_is_taken() -> None:
    for fresh in FRESH_NOISE:
        run = SamplerOptions("self-forcing", fresh).run(FACTS, white(0), SIGMAS, 2 * SEEDS - 1)
        assert made(run).isfinite().all()


def test_a_schedule_that_agrees_is_taken_and_its_chunks_are() -> None:
    for schedule in (
        ChunkSchedule("self-forcing", chunk=1),
        ChunkSchedule(levels=(1000, 750, 500, 250), chunk=1),
    ):
        run = SamplerOptions("self-forcing", schedule=schedule).run(FACTS, white(0), SIGMAS, 0)
        assert run.plan.preset.chunk == 1
    window = CacheOptions(window=4, sink=1)
    assert (
        SamplerOptions("self-forcing", cache=window)
        .run(FACTS, white(0), SIGMAS, 0)
        .plan.preset.sink
        == 1
    )


def test_the_memory_policy_of_a_cache_is_the_runs() -> None:
    cache = CacheOptions(policy=TopFrames(k=1, recent=1))
    plain, chosen = (
        SamplerOptions("self-forcing", cache=given).run(FACTS, white(3), SIGMAS, 3)
        for given in (None, cache)
    )
    assert chosen.plan.policy == cache.policy
    assert not torch.equal(made(plain), made(chosen))


@pytest.mark.parametrize(
    "schedule",
    [
        ChunkSchedule("causvid"),
        ChunkSchedule(levels=(1000, 500)),
        ChunkSchedule("causal-forcing-2step"),
    ],
)
def test_a_schedule_that_contradicts_the_sigmas_is_an_error(schedule: ChunkSchedule) -> None:
    with pytest.raises(ValueError, match="CHUNK_SCHEDULE says sigmas"):
        SamplerOptions("self-forcing", schedule=schedule).run(FACTS, white(0), SIGMAS, 0)


@pytest.mark.parametrize(
    "sigmas", [[], [1.0], [0.9, 0.5, 0.0], [1.0, 0.5], [1.0, 0.5, 0.5, 0.0], [1.0, 1.1, 0.0]]
)
def test_sigmas_that_do_not_fall_from_one_to_zero_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="SIGMAS"):
        levels_of(torch.tensor(sigmas), PRESETS["self-forcing"])


def test_a_start_goes_into_the_run_and_out_again() -> None:
    start = {"samples": raw_latents(torch.randn(1, 16, 3, 4, 4))}
    run = SamplerOptions("self-forcing", start=start).run(FACTS, white(0), SIGMAS, 0)
    assert torch.equal(made(run)[:, :, :3], normalized(start["samples"]))


@pytest.mark.parametrize("name", ["self-forcing", "causvid", "krea-14b"])
def test_levels_have_the_names_that_their_preset_has_for_them(name: str) -> None:
    preset = PRESETS[name]
    sigmas = torch.tensor([*(level.sigma for level in preset.chunk_levels()), 0.0])
    assert tuple(level.step for level in levels_of(sigmas, preset)) == preset.levels
    many = torch.cat((torch.linspace(1, 0.001, 900), torch.zeros(1)))  # more than there are names
    steps = [level.step for level in levels_of(many, preset)]
    assert len(set(steps)) == 900, "levels of one name would share their noise"
    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[-1]) == (1000, 1)


@pytest.mark.parametrize("method", ["self-forcing", "self-refine"])
def test_a_refiner_refines_the_levels_of_the_sigmas(method: str) -> None:
    plain = SamplerOptions(method).run(FACTS, white(3), SIGMAS, 3)
    run = SamplerOptions(method, refiner=REFINER).run(FACTS, white(3), SIGMAS, 3)
    assert run.refined.levels == (750, 500, 250)
    assert (made(run) - made(plain)).abs().max() > 0.01
    zero = SamplerOptions(method, refiner=replace(REFINER, strength=0.0)).run(
        FACTS, white(3), SIGMAS, 3
    )
    assert zero.refined is None


def test_self_refine_repeats_the_levels_of_the_sigmas() -> None:
    plain, repeated = (
        SamplerOptions(method).run(FACTS, white(3), SIGMAS, 3)
        for method in ("self-forcing", "self-refine")
    )
    assert not torch.equal(made(plain), made(repeated))


def test_a_refiner_is_refused_where_the_sigmas_have_none_of_its_levels() -> None:
    with pytest.raises(ValueError, match="1000, 385"):
        SamplerOptions("self-forcing", refiner=REFINER).run(
            FACTS, white(0), torch.tensor([1.0, 0.7576, 0.0]), 0
        )


def test_a_start_image_on_the_model_is_where_a_run_begins() -> None:
    """ARVideoI2V stores raw latents on the model; a connected start beside them is an error."""
    raw = raw_latents(torch.randn(1, 16, 1, 4, 4))
    facts = replace(FACTS, start=raw)
    run = SamplerOptions("self-forcing").run(facts, white(0), SIGMAS, 0)
    assert run.plan.given == 1
    assert torch.equal(made(run)[:, :, :1], normalized(raw))
    with pytest.raises(ValueError, match="ARVideoI2V"):
        SamplerOptions("self-forcing", start={"samples": raw}).run(facts, white(0), SIGMAS, 0)
