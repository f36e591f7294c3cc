"""Knobs of methods, and noises, in the sampler nodes without ComfyUI."""

import pytest
import torch
from comfy_graphs import small
from standalone_runs import refusal

from autorefiner.nodes.custom_sampler import PathwiseRefinedCustomSampler
from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.passes import Passes
from autorefiner.nodes.run import ModelFacts, Run, plan_run, summary
from autorefiner.nodes.sampler import PathwiseRefinedSampler
from autorefiner.refiner.choices import choose
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.noise.sources import NOISES
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import SAMPLERS, SEARCHES
from autorefiner.refiner.schedule import PRESETS

from tiny import TINY

PRESET = PRESETS["self-forcing"]
FRAMES, SIDE, SEED, PROMPT = 9, 4, 5, "a red star circles on a navy ground"
SIGMAS = torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0])  # shift 5, four simple steps
FACTS = ModelFacts(TINY, torch.float32, None, 1 << 30)
KNOBS = [("self-refine", "750=3, threshold=0.01"), ("ttc", "below=900,anchor=2")]
SHAPES = [("antiphase", "rho=0.4"), ("freenoise", "window=1,path=1"), ("ar", "b=0.3")]


@pytest.fixture
def demo(stand_ins) -> tuple:
    """Return the stand-ins' MODEL, CLIP and VAE."""
    return standalone.load_demo("student")


def sampled(demo: tuple, method: str = "self-forcing", **knobs: str) -> torch.Tensor:
    """Sample with Pathwise Refined Sampler."""
    model, clip, _ = demo
    size = (8 * SIDE, 8 * SIDE, 4 * FRAMES - 3, 1)
    inputs = ([[clip.context(PROMPT), {}]], *size, SEED, method)
    return PathwiseRefinedSampler.execute(model, *inputs, **knobs).args[0]["samples"]


def of_core(demo: tuple, method: str = "self-forcing", noise: str = "white") -> torch.Tensor:
    """Return the raw latents that the core samples."""
    model, clip, _ = demo
    shaped = choose(noise, NOISES, "noise")(WhiteNoise(SEED), PRESET.chunk)
    plan, chosen = RunPlan(PRESET, FRAMES, SIDE, SIDE), choose(method, SAMPLERS, "method")
    chunks = sample(model.network, clip.context(PROMPT), plan, noise=shaped, method=chosen)
    return standalone.raw_latents(torch.cat(list(chunks), 2))


@pytest.mark.parametrize(("method", "settings"), KNOBS)
def test_knobs_reach_the_method(method: str, settings: str, demo: tuple) -> None:
    latents = sampled(demo, method, method_settings=settings)
    assert torch.equal(latents, of_core(demo, f"{method}:{settings}"))
    assert not torch.equal(latents, sampled(demo, method))


@pytest.mark.parametrize(("noise", "settings"), SHAPES)
def test_noise_and_its_knobs_reach_the_run(noise: str, settings: str, demo: tuple) -> None:
    latents = sampled(demo, noise=noise, noise_settings=settings)
    assert torch.equal(latents, of_core(demo, noise=f"{noise}:{settings}"))
    assert not torch.equal(latents, sampled(demo, noise=noise))


@pytest.mark.parametrize("noise", NOISES)
def test_every_noise_has_its_defaults_without_settings(noise: str, demo: tuple) -> None:
    assert torch.equal(sampled(demo, noise=noise, noise_settings=" "), of_core(demo, noise=noise))


@pytest.mark.parametrize("method", SAMPLERS)
def test_calls_from_before_the_knobs_run_as_they_did(method: str, demo: tuple) -> None:
    assert torch.equal(sampled(demo, method), of_core(demo, method))


def test_knobs_reach_the_method_of_the_custom_sampler(demo: tuple, monkeypatch) -> None:
    monkeypatch.setattr(standalone, "make_sampler", lambda options: options)
    model, clip, _ = demo

    def made(**knobs: str) -> torch.Tensor:
        method, fresh = "self-refine", "per chunk and level"
        (options,) = PathwiseRefinedCustomSampler.execute(method, fresh, **knobs).args
        run = options.run(standalone.facts(model), torch.zeros(1, 16, 3, SIDE, SIDE), SIGMAS, SEED)
        return run.clip(model.network, clip.context(PROMPT), torch.device("cpu"), torch.float32)

    none = made(method_settings="750=0,500=0")
    assert torch.equal(made(), made(method_settings=""))
    assert not torch.equal(made(), none)


def test_progress_and_the_line_of_the_node_are_of_the_chosen_knobs() -> None:
    plan = plan_run(PRESET, (1, FRAMES, SIDE, SIDE), None)
    plain, chosen = Run(plan, SEED, "ttc"), Run(plan, SEED, "ttc:count=2", noise_text="ar:b=0.3")
    assert Passes(chosen).total > Passes(plain).total
    line, other = (summary(run, FACTS) for run in (chosen, plain))
    assert "ttc:count=2" in line and "noise ar:b=0.3" in line
    assert "ttc" not in other and "noise" not in other
    assert "self-refine" in summary(Run(plan, SEED, "self-refine:750=0,500=0"), FACTS)


REFUSED = [
    ({"method_settings": "threshold=0.2"}, "no knob 'threshold'"),
    ({"method": "ttc", "method_settings": "anchor=0"}, "at least 1"),
    ({"method": "ttc", "method_settings": "count=few\nbelow=6"}, "whole number"),
    ({"method": "ttc", "method_settings": "count=" + "1" * 300}, "characters"),
    ({"method": "ttc:count=2"}, "ttc:count=2"),
    *(({"method": name, "method_settings": "candidates=3"}, "candidates") for name in SEARCHES),
    ({"noise": "pink"}, "pink"),
    ({"noise": "ar:b=0.3"}, "ar:b=0.3"),
    ({"noise": "ar", "noise_settings": "b=2"}, "ar noise"),
    ({"noise": "white", "noise_settings": "rho=0.2"}, "no knob 'rho'"),
    ({"noise": "ar", "noise_settings": "b=" + "0" * 300}, "characters"),
]


@pytest.mark.parametrize(("inputs", "word"), REFUSED)
def test_what_there_is_not_is_refused_before_anything_is_loaded(
    inputs: dict, word: str, base, monkeypatch
) -> None:
    monkeypatch.setattr(standalone, "load_demo", lambda network: pytest.fail("loaded"))
    graph = small("text_to_video")
    graph["3"]["inputs"] |= inputs
    assert word in refusal(graph, base)
    chosen = {"method": "self-forcing", **inputs}
    assert word in PathwiseRefinedSampler.validate_inputs(**chosen)
    for name in ("noise", "noise_settings"):
        chosen.pop(name, None)
    checked = PathwiseRefinedCustomSampler.validate_inputs(**chosen)
    assert checked is True if len(chosen) == 1 and "method" not in inputs else word in checked


@pytest.mark.parametrize(("inputs", "word"), REFUSED)
def test_what_a_link_brings_is_refused_where_it_is_known(
    inputs: dict, word: str, demo: tuple
) -> None:
    with pytest.raises(ValueError, match=word) as error:
        sampled(demo, **inputs)
    assert "\n" not in str(error.value)
