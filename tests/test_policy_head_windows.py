"""head-windows: what static and dynamic heads read, and lists of heads in files."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.cli import main
from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.heads import HeadList
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.policies import HeadWindows, Window
from autorefiner.refiner.memory.policy import Frames, Held, Policy
from autorefiner.refiner.memory.positions import Absolute, Flex, Positions
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.training.self_rollout import self_rollout
from autorefiner.refiner.wan.causal import Kernels, KeyValue, attend
from autorefiner.refiner.wan.transformer import WanConfig

from tiny import tiny_network

CONFIG = WanConfig(dim=128, num_heads=2, ffn_dim=128, num_layers=2, text_dim=32, text_len=8)
PRESET = PRESETS["self-forcing"].changed(levels=(1000, 500))
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
FRAMES, HEIGHT, WIDTH = 15, 4, 6
HEADS = str(Path(__file__).with_name("heads.json"))  # in layer 1, head 1 is static
EVERY_HEAD = {"layer_idx": 0, "static_head": [0], "dynamic_head": [1]}


@pytest.fixture(scope="module")
def network():
    return tiny_network(CONFIG)


def run(network, policy, keys=None, preset=PRESET) -> Tensor:
    plan = RunPlan(preset, FRAMES, HEIGHT, WIDTH, policy=policy, keys=keys)
    return torch.cat(list(sample(network, CONTEXT, plan)), 2)


def write_heads(path: Path, layers: object) -> str:
    path.write_text(json.dumps(layers))
    return str(path)


@dataclass(frozen=True, slots=True)
class Ends(Policy):
    """Layers but the first see the first and the last frame of the past."""

    name: ClassVar[str] = "ends"

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        if layer == 0 or len(frames.past) < 3:
            return frames.all(layer)
        return frames.take(layer, torch.tensor([[0, len(frames.past) - 1]]))


class Past:
    """Six past frames of six tokens, of which segments have two, and a chunk; in a ring's order."""

    places = (0, 3, 4, 1, 2, 5, 6)
    past, chunk = [Held(i, frame) for i, frame in enumerate((0, 7, 8, 9, 10, 11))], 1
    plan = MemoryPlan(layers=3, heads=4, head_dim=12, batch=2, height=2, width=3, window_frames=7)

    def __init__(self, keys: str, positions: Positions) -> None:
        generator = torch.Generator().manual_seed(0)
        self.plan = replace(self.plan, keys=keys, positions=positions)
        self.layer = KeyValue(*torch.randn(2, 2, 42, 4, 12, generator=generator))
        self.raw_key = torch.randn(2, 36, 4, 12, generator=generator)
        self.decisions = 0

    def all(self, layer: int) -> KeyValue:
        return self.layer

    def stored(self, layer: int, ranks: range) -> KeyValue:
        assert layer == 1
        self.decisions += 1
        key = self.raw_key.unflatten(1, (6, 6))[:, list(ranks)].flatten(1, 2)
        if self.plan.keys == "rotated":
            key = self.plan.rotate(key, [self.past[rank].frame for rank in ranks])
        return KeyValue(key, key)

    def changing(self, row: int, share: int) -> list[tuple[int, int]]:
        """Return the (frame, segment) pairs between first and last frame that change most."""
        width = self.raw_key.flatten(2)[row]
        alike = {}
        for rank in range(1, 5):
            for segment in range(3):
                tokens = range(6 * rank + 2 * segment, 6 * rank + 2 * segment + 2)
                cosines = [torch.cosine_similarity(width[t], width[t + 6], dim=0) for t in tokens]
                alike[rank, segment] = sum(cosines)
        return sorted(sorted(alike, key=alike.get)[:share])

    def tokens(self, segments: list[tuple[int, int]]) -> list[int]:
        return [6 * self.places[rank] + 2 * cut + i for rank, cut in segments for i in range(2)]


def whole_frames(*ranks: int) -> list[tuple[int, int]]:
    return [(rank, segment) for rank in ranks for segment in range(3)]


@pytest.mark.parametrize("keys", ["rotated", "raw"])
@pytest.mark.parametrize("window", [-1, 9])
def test_without_static_heads_and_ratio_1_it_is_full_history(network, keys, window) -> None:
    preset = PRESET.changed(window=window, sink=3 if window > 0 else 0)
    full = run(network, Window(), keys, preset)
    assert torch.equal(run(network, HeadWindows(ratio=1), keys, preset), full)


@pytest.mark.parametrize(
    ("keys", "positions"),
    [("rotated", Absolute()), ("raw", Absolute()), ("rotated", Flex(scale=0.01, trained=1))],
)
def test_each_kind_of_head_reads_its_own_segments(tmp_path, keys, positions) -> None:
    past, static = Past(keys, positions), (1, 2)
    layer = {"static_head": [2, 1], "dynamic_head": [0, 3]}
    heads = write_heads(tmp_path / "a.json", [{"layer_idx": i, **layer} for i in range(3)])
    policy = HeadWindows(heads=heads, segments=3, ratio=0.4)
    reader = policy.start(past.plan, "cpu")
    query = torch.randn(2, 6, 4, 12, generator=torch.Generator().manual_seed(1))
    assert reader.read(0, query, past) is past.layer
    for layer in (1, 2):
        out = attend(query, reader.read(layer, query, past), 0, Kernels()).unflatten(-1, (4, 12))
        for row, head in ((row, head) for row in range(2) for head in range(4)):
            middle = [] if head in static else past.changing(row, 5)  # of 12 · 0.4
            tokens = past.tokens([*whole_frames(0), *middle, *whole_frames(5, 6)])
            key, value = (part[row, tokens, head] for part in past.layer)
            scores = query[row, :, head] @ key.T / 12**0.5
            assert (out[row, :, head] - scores.softmax(1) @ value).abs().max() < 1e-5
    assert past.decisions == 1
    reader.opening(past)
    reader.read(1, query, past)
    assert past.decisions == 2


def test_the_last_keys_of_a_group_are_those_of_the_pass() -> None:
    """The leading tokens of a joint refine pass leave out as many keys as follow them."""
    past = Past("rotated", Absolute())
    seen = HeadWindows(segments=3).start(past.plan, "cpu").read(1, torch.zeros(2, 6, 4, 12), past)
    assert torch.equal(seen[0].key[:, -6:], past.layer.key[:, -6:])


def test_without_dynamic_heads_the_ends_are_read(network, tmp_path) -> None:
    layers = [{"layer_idx": i, "static_head": [0, 1], "dynamic_head": []} for i in range(2)]
    static = HeadWindows(heads=write_heads(tmp_path / "heads.json", layers))
    assert (run(network, static) - run(network, Ends())).abs().max() < 1e-5


def test_each_knob_does_something(network) -> None:
    clips = [run(network, Window())]
    alone = ({}, {"ratio": 0.7}, {"segments": 2}, {"recent": 3}, {"heads": HEADS})
    for knobs in (*alone, {"heads": HEADS, "ratio": 1}):
        clips.append(run(network, HeadWindows(**knobs)))
        assert all((clips[-1] - clip).abs().max() > 1e-5 for clip in clips[:-1])


def test_a_recomputed_layer_reads_the_same_segments(network) -> None:
    gradients = []
    for checkpointing in (False, True):
        one_level = PRESET.changed(levels=(1000,), window=9)
        plan = RunPlan(one_level, 12, HEIGHT, WIDTH, policy=HeadWindows(heads=HEADS))
        trained = replace(network, checkpointing=checkpointing)
        rollout = Rollout.of(trained, CONTEXT, plan, WhiteNoise(0), memory=GraphMemory)
        self_rollout(rollout, 0).square().mean().backward()
        gradients.append(network.model.blocks[1].self_attn.k.weight.grad.clone())
        network.model.zero_grad()
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6 * gradients[0].abs().max()


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"layers": 3},
        {"num_layers": 1},
        [3],
        [{**EVERY_HEAD, "layer_idx": 1}],
        [EVERY_HEAD, EVERY_HEAD],
        [{"layer_idx": 0, "static_head": [0]}],
        [{**EVERY_HEAD, "dynamic_head": [0]}],
        [{**EVERY_HEAD, "dynamic_head": [2]}],
        [{**EVERY_HEAD, "dynamic_head": [-1]}],
        [{**EVERY_HEAD, "dynamic_head": [True]}],
        [{**EVERY_HEAD, "dynamic_head": [1.0]}],
        [{**EVERY_HEAD, "dynamic_head": ["1"]}],
        [{**EVERY_HEAD, "dynamic_head": [[1]]}],
        [{"layer_idx": 0, "static_head": [], "dynamic_head": []}],
        [EVERY_HEAD, {"layer_idx": 1, "static_head": [], "dynamic_head": [0]}],
    ],
)
def test_a_list_names_every_head_of_every_layer_once(tmp_path, content) -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        HeadWindows(heads=write_heads(tmp_path / "heads.json", content))
    assert "\n" not in str(error.value)


def test_a_list_is_read_up_to_a_mebibyte(tmp_path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(" " * (1 << 20) + json.dumps([EVERY_HEAD]))
    with pytest.raises(ValueError, match="1 MiB"):
        HeadList.read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="JSON"):
        HeadList.read(path)


def test_a_list_is_for_one_model(tmp_path) -> None:
    plan = MemoryPlan.of(CONFIG, (1, 16, 9, 4, 6), policy=HeadWindows(heads=HEADS))
    assert plan.policy.listed.static == ((0, 1), (1,))
    with pytest.raises(ValueError, match="2 layers of 2"):
        replace(plan, heads=4)


@pytest.mark.parametrize(
    "knobs", [{"ratio": 1.1}, {"ratio": -0.1}, {"segments": 0}, {"recent": 0}, {"sink": -1}]
)
def test_wrong_knobs_are_refused(knobs) -> None:
    with pytest.raises(ValueError, match="ratio"):
        HeadWindows(**knobs)


def test_a_missing_list_is_one_line_before_anything_is_loaded(tmp_path, capsys) -> None:
    command = [
        "generate",
        "--model",
        "random-tiny",
        "--prompt",
        "x",
        "--out",
        str(tmp_path / "a.mp4"),
    ]
    assert main([*command, "--memory", f"head-windows:heads={tmp_path / 'none.json'}"]) == 2
    assert "none.json" in capsys.readouterr().err
