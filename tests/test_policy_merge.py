"""`merge`: which tokens stand for which, and that attention stays the same where keys are equal."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.policies import Merge, Window
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import KeyValue, Seen, attention

from tiny import tiny_network

PRESET = PRESETS["self-forcing"].changed(levels=(1000, 500), window=9, sink=3)
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
A, B, C, D = torch.eye(4)


@dataclass
class Given:
    """Frames of one pass, with these tokens [B, T, H, D]; the last frame is the chunk."""

    key: Tensor
    value: Tensor
    plan: MemoryPlan
    current: tuple[int, ...] = (9,)
    chunk: int = 1

    @property
    def past(self) -> range:
        return range(self.key.shape[1] // self.plan.frame_tokens - 1)

    def all(self, layer: int) -> KeyValue:
        return KeyValue(self.key, self.value)

    def take(self, layer: int, ranks_BF: Tensor) -> KeyValue:
        assert ranks_BF.tolist() == [list(self.past)] * len(self.key)
        return self.all(layer)


def given(keys: list[Tensor], values: Tensor, frame_tokens: int) -> Given:
    """Return frames of one head; `keys` has a tensor [T, D] for each sample."""
    key = torch.stack(keys)[:, :, None]
    plan = MemoryPlan(1, 1, 4, len(keys), 1, frame_tokens, window_frames=5)
    value = values.view(1, -1, 1, 1).expand(len(keys), -1, 1, 4)
    return Given(key, value.to(key.dtype), plan)


def read(frames: Given, threshold: float = 0.9, policy=None) -> Seen:
    policy = policy or Merge(threshold).start(frames.plan, "cpu")
    query = torch.zeros(len(frames.key), 1, *frames.key.shape[2:], dtype=frames.key.dtype)
    return policy.read(0, query, frames)[0]


def test_a_later_key_stands_for_those_before_with_their_mean_and_count() -> None:
    near = A + 0.1 * C  # cosine 0.995 with A
    keys = [A, B, C, near, near, A, D, D]  # three frames of two tokens, and the chunk
    seen = read(given([torch.stack(keys)], torch.tensor([0.0, 8, 1, 6, 9, 3, 5, 7]), 2))
    # Frame 1 takes over the first token of frame 0: (0 + 6) / 2. Both tokens of frame 2 match that
    # one and share it, one token each: (9 + 3) / 2 and (3 + 3) / 2. The chunk is as it was.
    assert torch.equal(seen.key[0, :, 0], torch.stack([B, C, near, A, D, D]))
    assert seen.value[0, :, 0, 0].tolist() == pytest.approx([8, 1, 6, 3, 5, 7])
    assert seen.bias.shape == (1, 1, 1, 6)
    assert seen.bias.exp().flatten().tolist() == pytest.approx([1, 1, 2, 2, 1, 1])
    stricter = read(given([torch.stack(keys)], torch.arange(8.0), 2), threshold=0.999)
    assert stricter.value[0, :, 0, 0].tolist() == pytest.approx([0, 1, 2, 3.5, 5, 6, 7]), (
        "only the key of frame 1 that comes again in frame 2"
    )


def test_the_cosine_is_that_of_all_heads() -> None:
    key = torch.stack([A, B, A, C, D, D]).view(1, 3, 2, 4)  # two heads: one the same, one not
    plan = MemoryPlan(1, 2, 4, 1, 1, 1, window_frames=3)
    frames = Given(key, torch.zeros_like(key), plan)
    assert [read(frames, threshold).key.shape[1] for threshold in (0.4, 0.6)] == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_over_merged_duplicates_is_dense_attention(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(2, 40, 2, 8, generator=generator, dtype=dtype)
    frames = [own[:, :6]]
    for number in (1, 2, 3):  # tokens repeat, at other places, some twice; fewer in sample 1
        places = torch.randint(6, (2, 6), generator=generator)
        frame = frames[-1][torch.arange(2)[:, None], places]
        frame[0, :2], frame[1, :4] = own[0, 6 * number :][:2], own[1, 6 * number :][:4]
        frames.append(frame)
    key = torch.cat((*frames, own[:, 30:36]), dim=1)
    value = torch.randn(key.shape, generator=generator, dtype=dtype)
    query = torch.randn(2, 5, 2, 8, generator=generator, dtype=dtype)
    whole = Given(key, value, MemoryPlan(1, 2, 8, 2, 2, 3, window_frames=5))
    seen = read(whole, threshold=0.999)
    assert seen.key.shape[1] < key.shape[1]
    # the counts add up to all tokens; what only the other sample keeps is hidden
    assert seen.bias.exp().sum(dim=-1).flatten().tolist() == pytest.approx([30, 30])
    assert (seen.bias < 0).any(dim=-1).sum() == 1
    merged = attention(query, seen.key, seen.value, seen.bias)
    assert (merged - attention(query, key, value)).abs().max() < 1e-6


def test_a_chunk_chooses_once() -> None:
    frames = given([torch.stack([A, B, A, C, D, D])], torch.arange(6.0), 2)
    policy = Merge().start(frames.plan, "cpu")
    first = read(frames, policy=policy)
    frames.key = frames.key.roll(1, dims=-1)  # as another pass would: the same similarities
    frames.key[:, 2] = -frames.key[:, 2]  # but for a token
    assert torch.equal(read(frames, policy=policy).bias, first.bias)
    policy.flushed(keep_sink=True)
    assert not torch.equal(read(frames, policy=policy).bias, first.bias)
    frames.key[:, 2] = -frames.key[:, 2]
    frames.current = (10,)
    assert torch.equal(read(frames, policy=policy).bias, first.bias)


@pytest.mark.parametrize("keys", ["rotated", "raw"])
def test_a_threshold_above_1_is_the_window(keys) -> None:
    network = tiny_network()
    window, untouched, merged = (
        torch.cat(list(sample(network, CONTEXT, RunPlan(PRESET, 15, 4, 6, keys=keys, policy=p))), 2)
        for p in (Window(), Merge(threshold=1.01), Merge(threshold=0.2))
    )
    assert torch.equal(untouched, window)
    assert torch.equal(merged[:, :, :3], window[:, :, :3])  # without a past
    assert (merged - window).abs().max() > 1e-3


def test_a_threshold_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine"):
        Merge(threshold=0)
