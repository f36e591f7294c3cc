"""Search methods of the sampler nodes without ComfyUI: choices, inputs, and missing inputs."""

import dataclasses
from pathlib import Path

import pytest
import torch
from comfy_graphs import node, small
from demo_files import random_pairs
from standalone_runs import execute, refusal

from autorefiner.nodes.custom_sampler import PathwiseRefinedCustomSampler
from autorefiner.nodes.guided import SamplerOptions
from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.passes import Passes
from autorefiner.nodes.refiner_plan import RefinerLora
from autorefiner.nodes.rewards import Rewards
from autorefiner.nodes.run import Run, held_bytes, plan_run
from autorefiner.nodes.search import RewardSearch, SearchByReward
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.noise.file import RefinerCard
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.samplers import SEARCHES
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.timeline import Timeline
from autorefiner.refiner.training.rewards.reward import Mixture
from autorefiner.refiner.training.rewards.verifier import RewardVerifier

PROMPT = "a red star"
NEEDED = {"reward": ["40", 0], "vae": ["1", 2], "prompt": PROMPT}


def searching(method: str = "best-of-n", **inputs: object) -> dict:
    """Return a short text-to-video graph with a search of two candidates; None drops an input."""
    graph = small("text_to_video")
    graph["40"] = node(
        "AutoRefinerLoadReward", kind="sprites", model="bundled", weight=1.0, frames=0, interval=0
    )
    given = {"length": 13, "method": method, "candidates": 2, **NEEDED, **inputs}
    inputs = graph["3"]["inputs"] | given
    graph["3"]["inputs"] = {name: value for name, value in inputs.items() if value is not None}
    return graph


def made(graph: dict, base: Path) -> torch.Tensor:
    return execute(graph, base)["3"][0]["samples"]


@pytest.fixture
def search(base: Path) -> RewardSearch:
    """Return a search over two candidates by the stand-in reward."""
    rewards = Rewards(((bundle.load_sprite_reward(bundle.WEIGHTS), 1.0),), ("sprites",))
    return RewardSearch("best-of-n", rewards, bundle.load_sprite_vae(bundle.WEIGHTS), PROMPT, 2)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_makes_what_the_core_does(method: str, base: Path, capsys) -> None:
    graph = searching(method, batch_size=2, candidates=3)
    network = bundle.load_sprite_network("student", bundle.WEIGHTS)
    context = bundle.load_sprite_text(bundle.WEIGHTS)([graph["2"]["inputs"]["text"]])
    mixture = Mixture(((bundle.load_sprite_reward(bundle.WEIGHTS), 1.0),))
    verifier = RewardVerifier(mixture, bundle.load_sprite_vae(bundle.WEIGHTS), [PROMPT] * 2)
    plan = RunPlan(PRESETS["self-forcing"], 4, 8, 8, batch=2)
    chunks = sample(network, context, plan, method=SEARCHES[method](verifier, 3))
    found = made(graph, base)
    assert torch.equal(found, standalone.raw_latents(torch.cat(list(chunks), 2)))
    assert f"{method} of 3 candidates by sprites" in capsys.readouterr().err
    assert not torch.equal(found, made(searching("self-forcing", batch_size=2), base))


def test_what_a_search_chooses_by_changes_no_other_method(base: Path) -> None:
    plain = searching("self-forcing", **dict.fromkeys((*NEEDED, "candidates")))
    assert torch.equal(made(searching("self-forcing"), base), made(plain, base))


def by_node(method: str, prompt: str = PROMPT, **inputs: object) -> dict:
    """Return the graph of `searching` with Search by Reward in place of the former inputs."""
    graph = searching("self-forcing", **dict.fromkeys((*NEEDED, "candidates")), **inputs)
    given = NEEDED | {"prompt": prompt}
    graph["41"] = node("AutoRefinerSearch", method=method, candidates=2, **given)
    graph["3"]["inputs"]["search"] = ["41", 0]
    return graph


@pytest.mark.parametrize("method", SEARCHES)
def test_the_search_node_gives_what_the_former_inputs_gave(method: str, base: Path) -> None:
    found = made(by_node(method), base)
    assert torch.equal(found, made(searching(method), base))
    named = by_node(method)
    named["3"]["inputs"]["method"] = method
    assert torch.equal(found, made(named, base))


def test_a_method_that_contradicts_the_search_is_refused(base: Path) -> None:
    for method in ("ode", "search-over-path"):
        graph = by_node("best-of-n")
        graph["3"]["inputs"]["method"] = method
        assert f"method {method} " in refusal(graph, base)


def test_a_search_reads_a_timeline_in_place_of_its_prompt(base: Path) -> None:
    assert "no prompt" in refusal(by_node("best-of-n", prompt=" "), base)
    assert "no prompt" in refusal(searching("best-of-n", prompt=" "), base)

    def of_timeline(prompt: str) -> torch.Tensor:
        graph = by_node("best-of-n", prompt=prompt)
        graph["2"] = node("AutoRefinerPromptTimeline", clip=["1", 1], text=PROMPT)
        return made(graph, base)

    assert torch.equal(of_timeline(""), of_timeline("a blue ring"))
    assert not torch.equal(of_timeline(""), made(by_node("best-of-n", prompt="a blue ring"), base))


def test_a_prompt_that_nothing_reads_is_mentioned(base: Path, capsys) -> None:
    for graph in (searching("self-forcing"), by_node("best-of-n")):
        graph["3"]["inputs"]["prompt"] = ""
        made(graph, base)
        assert "input prompt" not in capsys.readouterr().err
        graph["3"]["inputs"]["prompt"] = PROMPT
        made(graph, base)
        assert "input prompt" in capsys.readouterr().err


def test_a_search_refuses_a_vae_that_cannot_decode_for_it(monkeypatch) -> None:
    def width(vae: object) -> int:
        raise ValueError("vae is of another kind")

    monkeypatch.setattr(standalone, "vae_width", width)
    with pytest.raises(ValueError, match="vae"):
        SearchByReward.execute("best-of-n", Rewards((), ()), object(), PROMPT, 2)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (("reward",), "needs reward:"),
        (("vae",), "needs vae:"),
        (("reward", "vae", "prompt"), "needs reward and vae:"),
    ],
)
def test_a_search_that_lacks_something_says_what(
    method: str, lacking: tuple, message: str, base: Path
) -> None:
    expected = f"method {method} chooses by a reward and {message}"
    assert f"node 3 (Pathwise Refined Sampler): {expected}" in refusal(
        searching(method, **dict.fromkeys(lacking)), base
    )
    given = {name: value for name, value in NEEDED.items() if name not in lacking}
    with pytest.raises(ValueError, match=expected):
        PathwiseRefinedCustomSampler.execute(method, "per chunk and level", **given)


def test_the_memory_of_a_search_is_counted_and_refused(
    base: Path, search: RewardSearch, monkeypatch
) -> None:
    facts = standalone.facts(
        standalone.Model(bundle.load_sprite_network("student", bundle.WEIGHTS), "self-forcing")
    )
    plan = plan_run(PRESETS["self-forcing"], (2, 4, 8, 8), None)
    run, plain = Run(plan, 0, "best-of-n", search=search), Run(plan, 0, "self-forcing")
    weights = sum(
        p.nbytes
        for model in (search.vae, search.rewards.parts[0][0].model)
        for p in model.parameters()
    )
    more = held_bytes(run, facts) - held_bytes(plain, facts)
    assert more == search.nbytes(plan) > weights
    assert Passes(run).total == 2 * Passes(plain).total
    monkeypatch.setattr(
        standalone, "available_bytes", lambda device: held_bytes(plain, facts) + weights
    )
    assert "search's VAE" in refusal(searching(batch_size=2), base)
    assert made(searching("self-forcing", batch_size=2), base).isfinite().all()


def test_the_rewards_models_go_back_where_they_were_whatever_happens(search: RewardSearch) -> None:
    class Model(torch.nn.Module):
        def to(self, device: torch.device) -> "Model":
            seen.append((device.type, torch.is_inference_mode_enabled()))
            return self

    seen: list[tuple[str, bool]] = []
    reward = search.rewards.parts[0][0]
    object.__setattr__(reward, "model", Model())
    with (
        pytest.raises(KeyboardInterrupt),
        torch.inference_mode(),
        search.verifier(1, torch.device("cuda")),
    ):
        raise KeyboardInterrupt
    # Tensors moved in inference mode take no gradients.
    assert seen == [("cuda", False), ("cpu", False)]


def test_keys_that_a_refiner_reads_are_not_overwritten(base: Path) -> None:
    graph = searching("search-over-path", refiner=["50", 0])
    graph["50"] = node(
        "AutoRefinerLoadRefiner", model=["1", 0], file="sprites", strength=1.0, form="auto"
    )
    assert "pending" in refusal(graph, base)
    graph["3"]["inputs"]["method"] = "best-of-n"
    assert made(graph, base).isfinite().all()


def test_a_sampler_of_sigmas_searches_too(base: Path, search: RewardSearch) -> None:
    network = bundle.load_sprite_network("student", bundle.WEIGHTS)
    facts = standalone.facts(standalone.Model(network, "self-forcing"))
    context = bundle.load_sprite_text(bundle.WEIGHTS)([PROMPT])
    sigmas, noise = torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0]), torch.zeros(1, 16, 3, 8, 8)
    refiner = RefinerLora(
        "a.refiner.safetensors", random_pairs(), RefinerCard(rank=2), form="merged"
    )

    def clip(**options: object) -> torch.Tensor:
        run = SamplerOptions("best-of-n", search=search, **options).run(facts, noise, sigmas, 0)
        return run.clip(network, context, torch.device("cpu"), torch.float32)

    verifier = RewardVerifier(Mixture(search.rewards.parts), search.vae, [PROMPT])
    plain = SamplerOptions("self-forcing").run(facts, noise, sigmas, 0)
    method = SEARCHES["best-of-n"](verifier, 2)
    chunks = sample(network, context, plain.plan, noise=plain.noise, method=method)
    assert torch.equal(clip(), torch.cat(list(chunks), 2))
    assert not torch.equal(clip(refiner=refiner), clip())


def test_a_search_without_any_prompt_does_not_begin(search: RewardSearch) -> None:
    blank = dataclasses.replace(search, prompt="")
    with (
        pytest.raises(ValueError, match="prompt"),
        blank.verifier(1, torch.device("cpu")),
    ):
        pass
    with blank.verifier(1, torch.device("cpu"), Timeline.of(PROMPT)) as verifier:
        assert verifier is not None
