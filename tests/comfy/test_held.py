"""Held chunks: a run that begins like an earlier one samples the rest, with the same result."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autorefiner.nodes.held import DEFAULT_MIB, HeldChunks, chunk_keys, limit_bytes
from autorefiner.nodes.identity import Identities, Referable
from autorefiner.nodes.run import Run
from autorefiner.refiner.memory.policies import POLICIES
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.stores import STORES
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.noise.sources import NOISES
from autorefiner.refiner.recipe import parse_recipe
from autorefiner.refiner.refiner_plan import RefinerPlan
from autorefiner.refiner.run_plan import RunPlan, suggested
from autorefiner.refiner.samplers import SAMPLERS, Method
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.timeline import Flush, Recache, Scene, Timeline
from autorefiner.refiner.wan.transformer import WanConfig

from tiny import tiny_network

CONFIG = WanConfig(dim=128, num_heads=2, ffn_dim=64, num_layers=1, text_dim=32, text_len=8)
SF = PRESETS["self-forcing"]
CONTEXT, OTHER = torch.randn(2, 1, 8, 32, generator=torch.Generator().manual_seed(1))
SCENES = Timeline((Scene(0, CONTEXT), Scene(6, OTHER, Flush(1))))
CPU = torch.device("cpu")
FRAMES = 15
IDENTITIES = Identities()


@pytest.fixture(scope="module")
def network():
    return tiny_network(CONFIG)


def run_of(recipe: str = "", frames: int = FRAMES, preset=SF, noise="white", **options) -> Run:
    steps = parse_recipe(recipe)
    policy, store = options.pop("policy", None), options.pop("store", STORES["plain"])
    given, size = options.pop("given", 0), options.pop("size", (4, 4, 1))
    keys = options.pop("keys", None)
    plan = RunPlan(preset, frames, *size, given=given, keys=keys, policy=policy, store=store)
    plan = replace(plan, frames=steps.frames(plan) - given)
    source = NOISES[noise]()(steps.noise(WhiteNoise(0)), preset.chunk)
    options = {"seed": 0, "method": "self-forcing"} | options
    return Run(plan, noise=source, noise_text=noise, recipe=steps, **options)


def keys_of(run: Run, context: Tensor | Timeline[Tensor] = CONTEXT, model=0) -> list[bytes]:
    return chunk_keys(run, context, model, IDENTITIES)


def sampled(network, run: Run, held: HeldChunks, context=CONTEXT) -> tuple[Tensor, int]:
    """Return the clip and the number of chunks that were taken from `held`."""
    rest, hold = held.continued(run, keys_of(run, context))
    clip = rest.clip(network, context, CPU, torch.float32, finished=hold)
    return clip, rest.reused


def alone(network, run: Run, context=CONTEXT) -> Tensor:
    return run.clip(network, context, CPU, torch.float32)


@pytest.mark.parametrize(
    "recipe, reused",
    [("", 5), ("reroll 3", 2), ("keep 2", 2), ("extend 2", 5), ("keep 4; extend 3; reroll 4", 3)],
)
@pytest.mark.parametrize("context", [CONTEXT, SCENES], ids=["one prompt", "scenes"])
def test_a_recipe_samples_only_what_it_changes(network, recipe, reused: int, context) -> None:
    held = HeldChunks(1 << 30)
    sampled(network, run_of(), held, context)
    clip, number = sampled(network, run_of(recipe), held, context)
    assert number == reused
    assert torch.equal(clip, alone(network, run_of(recipe), context))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "self-forcing"])
def test_a_method_goes_on_from_held_chunks_or_samples_all(network, name: str) -> None:
    held = HeldChunks(1 << 30)
    sampled(network, run_of(method=name), held)
    clip, number = sampled(network, run_of("reroll 4", method=name), held)
    assert number == (3 if SAMPLERS[name]().goes_on else 0)
    assert torch.equal(clip, alone(network, run_of("reroll 4", method=name)))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "head-windows"])
@pytest.mark.parametrize("store", ["plain", "int8"])
def test_a_memory_is_rebuilt_from_held_chunks(network, name: str, store: str) -> None:
    policy = POLICIES[name]()
    preset = suggested(SF.changed(window=9, sink=3), policy)
    options = dict(preset=preset, policy=policy, store=STORES[store])
    held = HeldChunks(1 << 30)
    sampled(network, run_of(**options), held)
    clip, number = sampled(network, run_of("reroll 5", **options), held)
    assert number == 4
    assert torch.equal(clip, alone(network, run_of("reroll 5", **options)))


@pytest.mark.parametrize("noise", [name for name in NOISES if name != "white"])
def test_chunks_of_every_noise_are_held(network, noise: str) -> None:
    held = HeldChunks(1 << 30)
    sampled(network, run_of(noise=noise), held)
    clip, number = sampled(network, run_of("reroll 3", noise=noise), held)
    assert number == 2 and torch.equal(clip, alone(network, run_of("reroll 3", noise=noise)))


@pytest.mark.parametrize("frames, reused", [(3, 2), (6, 5), (FRAMES, 5), (FRAMES + 6, 5)])
def test_a_recache_of_all_the_past_is_the_same_in_a_longer_clip(
    network, frames: int, reused: int
) -> None:
    def scenes(recached: int) -> Timeline[Tensor]:
        return Timeline((Scene(0, CONTEXT), Scene(6, OTHER, Recache(recached))))

    held, longer = HeldChunks(1 << 30), run_of("extend 2")
    sampled(network, run_of(), held, scenes(FRAMES))
    clip, number = sampled(network, longer, held, scenes(frames))
    assert number == reused
    assert torch.equal(clip, alone(network, longer, scenes(frames)))


class Thing(Referable):
    __slots__ = ()


class Judged:
    """Stand-in for a search: its description and prompt, and a method that is never run."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def describe(self) -> str:
        return "best-of-n of 5 candidates"

    def sampler(self, verifier=None) -> Method:
        return SAMPLERS["self-forcing"]()


JOINT = ReflectiveCache("shared", "joint")
REFINED = RefinerPlan("a", {}, None, "merged", 1.0, (750,), JOINT, 0, 0)
CHANGES = {
    "seed": dict(seed=1),
    "method": dict(method="ode"),
    "levels": dict(preset=SF.changed(levels=(1000, 500))),
    "window": dict(preset=SF.changed(window=9)),
    "positions": dict(preset=SF.changed(positions="relative")),
    "memory": dict(policy=POLICIES["pooled"]()),
    "store": dict(store=STORES["int8"]),
    "noise": dict(noise="antiphase"),
    "source": dict(source=torch.ones(1, 16, FRAMES, 4, 4)),
    "NOISE": dict(given_noise=torch.ones(1, 16, FRAMES, 4, 4)),
    "object": dict(objects=(Thing(),)),
    "keys": dict(keys="raw"),
    "size": dict(size=(4, 6, 1)),
    "batch": dict(size=(4, 4, 2)),
    "refiner": dict(refined=REFINED),
    "search": dict(search=Judged("a fox"), method="best-of-n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_choice_that_changes_chunks_changes_their_keys(change: str) -> None:
    keys = keys_of(run_of())
    assert not set(keys) & set(keys_of(run_of(**CHANGES[change])))
    assert keys == keys_of(run_of())


def test_the_options_of_a_refiner_and_a_search_change_keys() -> None:
    refined = keys_of(run_of(refined=REFINED))
    for change in (dict(strength=0.5), dict(levels=(500,)), dict(form="unmerged")):
        assert not set(refined) & set(keys_of(run_of(refined=replace(REFINED, **change))))
    assert keys_of(run_of(refined=replace(REFINED))) == refined
    one, other = (keys_of(run_of(search=Judged(prompt))) for prompt in ("a fox", "a cat"))
    assert not set(one) & set(other)


def test_the_heads_in_a_file_change_keys(tmp_path) -> None:
    path, keys = tmp_path / "heads.json", []
    for static in ([], [0]):
        layer = {"layer_idx": 0, "static_head": static, "dynamic_head": [0, 1][len(static) :]}
        path.write_text(json.dumps([layer]), encoding="utf-8")
        keys.append(keys_of(run_of(policy=POLICIES["head-windows"](heads=str(path)))))
    assert not set(keys[0]) & set(keys[1])


def test_given_latents_change_keys_and_are_not_held_themselves(network) -> None:
    given = dict(frames=9, given=6)
    clips = [torch.zeros(1, 16, 6, 4, 4), torch.ones(1, 16, 6, 4, 4)]
    one, other = (keys_of(run_of(initial=clip, **given)) for clip in clips)
    assert len(one) == 3 and not set(one) & set(other)
    held = HeldChunks(1 << 30)
    clip, _ = sampled(network, run_of(initial=clips[0], **given), held)
    assert len(held) == 3
    again, number = sampled(network, run_of("reroll 5", initial=clips[0], **given), held)
    assert number == 2 and torch.equal(again[:, :, :12], clip[:, :, :12])


def test_the_model_and_the_prompt_change_keys() -> None:
    keys = keys_of(run_of())
    assert not set(keys) & set(keys_of(run_of(), model=1))
    assert not set(keys) & set(keys_of(run_of(), CONTEXT + 1e-6))
    later = keys_of(run_of(), SCENES)
    assert later[:2] == keys[:2] and not set(later[2:]) & set(keys)


def test_beyond_the_limit_the_oldest_chunks_are_dropped_and_known_to_have_been() -> None:
    held = HeldChunks(3 * 4 * 100)
    for index in range(4):
        held.put(bytes([index]), torch.zeros(100))
    assert held.nbytes == 1200 and len(held) == 3
    assert held.has_dropped(b"\0") and not held.has_dropped(b"\1")
    assert not held.first([b"\0", b"\1"]) and len(held.first([b"\1", b"\2", b"\5"])) == 2
    held.put(b"\6", torch.zeros(100))
    assert held.has_dropped(b"\3"), "chunks that were asked for last are dropped last"
    held.put(b"\7", torch.zeros(100))
    assert held.has_dropped(b"\2") and not held.has_dropped(b"\1"), "a run loses its end first"
    held.put(b"\x08", torch.zeros(1000))
    assert len(held) == 3, "a chunk larger than the limit is not held"


def test_a_held_chunk_does_not_hold_the_clip_that_it_is_a_slice_of() -> None:
    held = HeldChunks(1 << 20)
    held.put(b"a", torch.zeros(1, 16, 12, 4, 4)[:, :, :3])
    (x0,) = held.first([b"a"])
    assert x0.untyped_storage().nbytes() == held.nbytes == 4 * 16 * 3 * 16


def test_an_identity_is_never_given_twice() -> None:
    identities, numbers = Identities(), set()
    for _ in range(100):
        numbers.add(identities.of(Thing()))
    thing = Thing()
    assert len(numbers) == 100
    assert identities.of(thing) == identities.of(thing) and identities.of(None) is None


def test_the_limit_comes_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("AUTOREFINER_HELD_MIB", "7")
    assert limit_bytes() == 7 << 20
    monkeypatch.setenv("AUTOREFINER_HELD_MIB", "lots")
    assert limit_bytes() == DEFAULT_MIB << 20


def test_given_chunks_and_new_ones_are_announced_in_order(network) -> None:
    run = run_of()
    clip = alone(network, run)
    announced = []
    rest = run.after([clip[:, :, :3], clip[:, :, 3:6]])
    rest.clip(network, CONTEXT, CPU, torch.float32, finished=lambda *chunk: announced.append(chunk))
    assert [chunk.index for chunk, _ in announced] == [0, 1, 2, 3, 4]
    assert torch.equal(torch.cat([x0 for _, x0 in announced], 2), clip)


@pytest.mark.parametrize("frames", [13, 14, 15])
@pytest.mark.parametrize("given", [0, 1, 3])
@pytest.mark.parametrize("alone", [False, True])
def test_a_clip_of_held_chunks_alone_is_cut_as_it_was_sampled(
    network, frames: int, given: int, alone: bool
) -> None:
    initial = torch.zeros(1, 16, given, 4, 4) if given else None
    preset = replace(SF, first_alone=alone)
    run = run_of(frames=frames - given, preset=preset, given=given, initial=initial)
    held, announced = HeldChunks(1 << 30), []
    clip, _ = sampled(network, run, held)
    rest, _ = held.continued(run, keys_of(run))
    again = rest.clip(
        network, CONTEXT, CPU, torch.float32, finished=lambda *chunk: announced.append(chunk)
    )
    assert torch.equal(again, clip) and not rest.plan.chunks
    assert [x0.shape[2] for _, x0 in announced] == list(run.plan.lengths)
    assert [chunk.start for chunk, _ in announced] == [
        chunk.start for chunk in (*run.plan.given_chunks, *run.plan.chunks)
    ]
