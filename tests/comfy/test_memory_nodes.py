"""Reflective Cache chooses the memory policy of a run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from comfy_graphs import node, small
from demo_files import STAND_IN
from standalone_runs import refusal

from autorefiner.nodes import options
from autorefiner.nodes.cache import ReflectiveCacheNode, chosen_policy
from autorefiner.nodes.cache_view import cache_view
from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.options import CacheOptions, parse_policy, policy_text
from autorefiner.nodes.run import ModelFacts, Run, kv_bytes, plan_run, summary
from autorefiner.nodes.sampler import PathwiseRefinedSampler
from autorefiner.refiner.memory.policies import POLICIES, TopFrames, Window
from autorefiner.refiner.memory.policy import Policy
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.memory.store import PlainStore, Store
from autorefiner.refiner.memory.stores import STORES, OffloadStore
from autorefiner.refiner.run_plan import RunPlan, suggested
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS, Preset

PRESET = PRESETS["self-forcing"]
WIDGETS = {
    "window": -1, "sink": 0, "positions": "the model's", "history": "as trained",
    "previous_x0": "as trained",
}  # fmt: skip
FRAMES, SIDE, SEED, PROMPT = 12, 4, 5, "a red star circles on a navy ground"


@dataclass(frozen=True, slots=True)
class Suggesting(Window):
    """A window that suggests sizes and positions."""

    name: ClassVar[str] = "suggesting"
    window: ClassVar[tuple[int, int]] = (6, 2)
    positions: ClassVar[str] = "relative"


@pytest.fixture
def demo(stand_ins) -> tuple:
    """Return the stand-ins' MODEL, CLIP and VAE."""
    return standalone.load_demo("student")


def sampled(demo: tuple, **chosen: object) -> torch.Tensor:
    """Sample with these inputs of a Reflective Cache."""
    model, clip, _ = demo
    (cache,) = ReflectiveCacheNode.execute(**WIDGETS | chosen).args
    size = (8 * SIDE, 8 * SIDE, 4 * FRAMES - 3, 1)
    inputs = ([[clip.context(PROMPT), {}]], *size, SEED, "self-forcing")
    return PathwiseRefinedSampler.execute(model, *inputs, reflective_cache=cache).args[0]["samples"]


def of_core(
    demo: tuple, preset: Preset, policy: Policy, store: type[Store] = PlainStore
) -> torch.Tensor:
    """Return the raw latents that the core samples."""
    model, clip, _ = demo
    plan = RunPlan(preset, FRAMES, SIDE, SIDE, policy=policy, store=store)
    chunks = sample(model.network, clip.context(PROMPT), plan, seed=SEED)
    return standalone.raw_latents(torch.cat(list(chunks), 2))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_samples_from_the_node_what_it_does_in_the_core(
    name: str, demo: tuple
) -> None:
    policy = POLICIES[name]()
    core = of_core(demo, suggested(PRESET, policy), policy)
    assert torch.equal(sampled(demo, memory=name), core)


def test_knobs_and_a_window_of_the_nodes_own_reach_the_run(demo: tuple) -> None:
    own = {"window": 8, "sink": 2}
    latents = sampled(demo, **own, memory="top-frames", memory_settings="k=1, recent=1")
    assert torch.equal(latents, of_core(demo, PRESET.changed(**own), TopFrames(k=1, recent=1)))
    assert not torch.equal(latents, sampled(demo, **own))


@pytest.mark.parametrize("name", STORES)
def test_every_store_samples_from_the_node_what_it_does_in_the_core(name: str, demo: tuple) -> None:
    latents = sampled(demo, store=name)
    assert torch.equal(latents, of_core(demo, PRESET, Window(), STORES[name]))
    assert torch.equal(latents, sampled(demo)) == STORES[name].exact


def test_positions_take_knobs(demo: tuple) -> None:
    latents = sampled(demo, positions="flex", positions_settings="scale=0.5")
    preset = replace(PRESET, positions="flex:scale=0.5")
    assert torch.equal(latents, of_core(demo, preset, Window()))
    assert not torch.equal(latents, sampled(demo, positions="flex"))


def test_calls_from_before_the_policies_run_as_they_did(demo: tuple) -> None:
    assert torch.equal(sampled(demo), of_core(demo, PRESET, Window()))


def test_the_model_may_bring_a_policy_of_its_own() -> None:
    preset = replace(PRESET, memory="ema-sink", window=6, sink=2)
    own, chosen = CacheOptions(window=6, sink=2), CacheOptions(window=6, sink=2, policy=Window())
    shape = (1, FRAMES, SIDE, SIDE)
    names = [plan_run(preset, shape, None, cache).policy.name for cache in (None, own, chosen)]
    assert names == ["ema-sink", "ema-sink", "window"]


def test_a_policys_suggestions_hold_where_the_node_says_nothing() -> None:
    def applied(*given: object) -> tuple[int, int, str]:
        preset = CacheOptions(*given, policy=Suggesting()).applied(PRESET)
        return preset.window, preset.sink, preset.positions

    assert applied() == (6, 2, "relative")
    assert applied(9, 1, "absolute") == (9, 1, "absolute")


def test_the_node_says_what_a_policy_suggests(monkeypatch) -> None:
    monkeypatch.setitem(options.POLICIES, "suggesting", Suggesting)
    shown = ReflectiveCacheNode.execute(**WIDGETS, memory="suggesting").ui
    assert "6 latent frames, of them 2 sink" in shown and "suggesting" in shown


@pytest.mark.parametrize(
    ("memory", "settings", "word"),
    [
        ("no-such", "", "no-such"),
        ("top-frames", "frames=3", "knob"),
        ("top-frames", "k=0", "at least 1"),
        ("top-frames", "k=few\nrecent=3", "whole number"),
        ("top-frames", "k=" + "1" * 300, "characters"),
        ("the model's", "k=3", "choose"),
    ],
)
def test_settings_that_no_policy_has_are_refused_before_anything_is_loaded(
    memory: str, settings: str, word: str, base: Path, monkeypatch
) -> None:
    monkeypatch.setattr(standalone, "load_demo", lambda network: pytest.fail("loaded"))
    graph = small("text_to_video")
    chosen = {"memory": memory, "memory_settings": settings}
    graph["9"] = node("AutoRefinerReflectiveCache", **WIDGETS | chosen)
    graph["3"]["inputs"]["reflective_cache"] = ["9", 0]
    assert word in refusal(graph, base)


@dataclass(frozen=True, slots=True)
class Listing(Window):
    """A window with a file."""

    name: ClassVar[str] = "listing"
    heads: str = ""


def test_files_of_a_policy_lie_in_the_models_folder(base: Path, monkeypatch) -> None:
    monkeypatch.setitem(options.POLICIES, "listing", Listing)
    with standalone.running_at(standalone.place_of(base, None, "cpu")):
        policy = chosen_policy("listing", "heads=a.json")
        assert Path(policy.heads) == (base / "models" / "heads" / "a.json").resolve()
        assert policy_text(policy) == "listing:heads=a.json"
        for name in ("../../secret.json", "/etc/hostname"):
            assert "leaves" in ReflectiveCacheNode.validate_inputs(
                memory="listing", memory_settings=f"heads={name}"
            )


def test_the_drawing_counts_and_names_the_policy(stand_ins) -> None:
    size = {"width": 64, "height": 64, "length": 81, "batch_size": 1}
    asked = WIDGETS | {"window": 9, "sink": 3, "model": {"demo": True}, "size": size}
    asked |= {"positions_settings": "", "store": "plain"}
    view = cache_view({**asked, "memory": "top-frames", "memory_settings": "k=2"})
    plan = RunPlan(PRESET.changed(window=9, sink=3), 21, 8, 8, policy=TopFrames(k=2))
    assert view["bytes"] == RingMemory(plan.memory(STAND_IN, torch.float32)).nbytes
    assert (view["memory"], view["window"], view["sink"]) == ("top-frames:k=2", 9, 3)
    window = cache_view({**asked, "memory": "window", "memory_settings": ""})
    assert window["bytes"] < view["bytes"], "mean keys take bytes"


def test_offloaded_bytes_are_counted_where_they_lie() -> None:
    plan = plan_run(PRESET, (1, FRAMES, SIDE, SIDE), None, CacheOptions(store=OffloadStore))
    run = Run(plan, SEED, "self-forcing")
    facts = ModelFacts(STAND_IN, torch.float32, None, 1 << 30)
    together, besides = kv_bytes(run, facts)
    device, host = kv_bytes(run, replace(facts, device=torch.device("cuda")))
    assert besides == 0 and device + host == together and host > 0
    assert "host memory" in summary(run, replace(facts, device=torch.device("cuda")))


def test_a_policy_is_written_as_it_is_read() -> None:
    for text in ("window", "top-frames", "top-frames:k=2,recent=5"):
        assert policy_text(parse_policy(*f"{text}:".split(":")[:2])) == text
