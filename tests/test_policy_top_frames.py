"""top-frames: what the chunk, a head or a query token retrieves."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.estimate import pass_bytes
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.policies import TopFrames, Window
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import Kernels, KeyValue, attend
from autorefiner.refiner.wan.transformer import WanConfig

from tiny import TINY, tiny_network
from tiny_refiner import pairs_for

CONFIG = WanConfig(dim=128, num_heads=2, ffn_dim=128, num_layers=2, text_dim=32, text_len=8)
PRESET = PRESETS["self-forcing"].changed(levels=(1000, 500))
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
FRAMES, HEIGHT, WIDTH = 15, 4, 6
FINE = pytest.mark.parametrize("granularity", ["head", "token"])


@pytest.fixture(scope="module")
def network():
    return tiny_network(CONFIG)


def run(network, policy, keys=None, **options) -> Tensor:
    plan = RunPlan(PRESET, FRAMES, HEIGHT, WIDTH, policy=policy, keys=keys)
    return torch.cat(list(sample(network, CONTEXT, plan, **options)), 2)


class Past:
    """Five past frames and a chunk of one, two tokens each, in the order of a ring."""

    places = (0, 3, 1, 4, 2, 5)
    past, chunk = [None] * 5, 1

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.query = torch.randn(2, 4, 2, 4, generator=generator)
        self.layer = KeyValue(*torch.randn(2, 2, 12, 2, 4, generator=generator))
        self.mean_keys = torch.randn(2, 5, 2, 4, generator=generator)

    def means(self, layer: int) -> Tensor:
        return self.mean_keys

    def all(self, layer: int) -> KeyValue:
        return self.layer

    def tokens(self, ranks: list[int]) -> list[int]:
        return [2 * self.places[rank] + token for rank in ranks for token in range(2)]


def best_two(means_FD: Tensor, query_D: Tensor) -> list[int]:
    """Of frames 1 to 3, the two that answer a query best, by trying every pair."""
    pairs = combinations((1, 2, 3), 2)
    return list(max(pairs, key=lambda pair: sum(float(means_FD[f] @ query_D) for f in pair)))


def attended(query_D: Tensor, key_TD: Tensor, value_TD: Tensor) -> Tensor:
    return torch.softmax(key_TD @ query_D / len(query_D) ** 0.5, dim=0) @ value_TD


@FINE
@pytest.mark.parametrize("keys", ["rotated", "raw"])
def test_as_many_retrieved_frames_as_there_are_is_full_history(network, granularity, keys) -> None:
    full = run(network, Window(), keys)
    assert torch.equal(run(network, TopFrames(k=8, granularity=granularity), keys), full)
    fewer = run(network, TopFrames(k=7, granularity=granularity), keys)
    assert torch.equal(fewer[:, :, :12], full[:, :, :12])
    assert not torch.equal(fewer, full)


def test_granularities_differ_but_for_a_single_head(network) -> None:
    clips = [run(network, TopFrames(k=2, granularity=each)) for each in ("chunk", "head", "token")]
    assert all((a - b).abs().max() > 1e-4 for a, b in combinations(clips, 2))
    one_head = tiny_network(TINY)
    chunk, head = (run(one_head, TopFrames(k=2, granularity=each)) for each in ("chunk", "head"))
    assert (chunk - head).abs().max() < 1e-5


def test_a_head_reads_the_frames_that_its_own_mean_query_prefers() -> None:
    past = Past()
    seen = TopFrames(k=2, sink=1, recent=1, granularity="head").read(0, past.query, past)
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        query = past.query[row, :, head].mean(0)
        frames = [0, *best_two(past.mean_keys[row, :, head], query), 4, 5]
        for part, whole in zip(seen, past.layer, strict=True):
            expected = whole[row, past.tokens(frames), head]
            assert torch.equal(part[row, :, head], expected)


@pytest.mark.parametrize("first", [0, 2])
def test_a_token_attends_to_the_frames_that_it_prefers(first) -> None:
    past = Past()
    seen = TopFrames(k=2, sink=1, recent=1, granularity="token").read(0, past.query, past)
    out = attend(past.query, seen, first, Kernels()).unflatten(-1, (2, 4))
    chosen = set()
    for row, token, head in ((s, t, h) for s in range(2) for t in range(4) for h in range(2)):
        query = past.query[row, token, head]
        best = best_two(past.mean_keys[row, :, head], query)
        tokens = past.tokens([0, *best, 4, 5])
        if token < first:
            tokens = tokens[:-2]  # the call's own last tokens
        key, value = (part[row, tokens, head] for part in past.layer)
        assert (out[row, token, head] - attended(query, key, value)).abs().max() < 1e-5
        chosen.add(tuple(best))
    assert len(chosen) == 3


@pytest.mark.parametrize("previous", ["pending", "joint"])
def test_refine_passes_with_all_frames_are_those_of_the_window(network, previous) -> None:
    refiner = Refiner(merged(network, pairs_for(network)), ReflectiveCache("shared", previous))
    full = run(network, Window(), refiner=refiner)
    assert torch.equal(run(network, TopFrames(k=8, granularity="token"), refiner=refiner), full)


def test_the_masks_of_tokens_are_counted() -> None:
    plan = MemoryPlan.of(CONFIG, (2, 16, FRAMES, HEIGHT, WIDTH), policy=TopFrames(), spare_frames=3)
    by_token = replace(plan, policy=TopFrames(granularity="token"))
    mask = 2 * (6 * 6) * (18 * 6) * 4  # samples, tokens of a joint pass, tokens in memory, bytes
    assert pass_bytes(CONFIG, by_token, 3) - pass_bytes(CONFIG, plan, 3) == mask


@pytest.mark.parametrize(
    ("knobs", "word"), [({"granularity": "layer"}, "token"), ({"k": 0}, "at least 1")]
)
def test_wrong_knobs_are_refused(knobs, word) -> None:
    with pytest.raises(ValueError, match=word):
        TopFrames(**knobs)
