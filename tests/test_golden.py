"""Recorded tensors of the public Self-Forcing implementation, one test a case.

Cases are in tests/golden; AUTOREFINER_GOLDEN may name a folder with more.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from autorefiner.refiner.noise.source import Draw
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import Chunk, Preset
from autorefiner.refiner.wan.causal import CausalWan, KeyValue
from autorefiner.refiner.wan.rope import rotate
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer
from autorefiner.refiner.wan.vae import WanVAE

FOLDERS = [Path(__file__).parent / "golden"]
if extra := os.environ.get("AUTOREFINER_GOLDEN"):
    FOLDERS.append(Path(extra))


def config_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("config", "{}"))


def cases(*kinds: str) -> list:
    files = [path for folder in FOLDERS for path in sorted(folder.glob("*.safetensors"))]
    chosen = [path for path in files if config_of(path).get("kind") in kinds]
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in chosen]


def network_of(path: Path, config: dict) -> CausalWan:
    sizes = WanConfig(**config["model"])
    model = WanTransformer(sizes)
    weights = load_file(path.parent / config.get("weights", "dit_weights.safetensors"))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return CausalWan(model, sizes)


class Recorder:
    """A view of an empty past that keeps each layer's new keys (after RoPE) and values."""

    def __init__(self, start: int, frames: int) -> None:
        self.positions, self.first = tuple(range(start, start + frames)), 0
        self.layers: list[KeyValue] = []

    def extend(self, layer, raw_key, value, table, raw_query=None) -> KeyValue:
        self.layers.append(KeyValue(rotate(raw_key, table), value))
        return self.layers[-1]


class Recorded:
    """Recorded noise: the initial noise of the whole video, then the path's noise in draw order."""

    def __init__(self, tensors: dict, given: int) -> None:
        self.initial = tensors["noise"].transpose(1, 2)
        self.path = iter(
            tensors[name].transpose(1, 2)
            for name in sorted(tensors)
            if name.startswith("path_noise.")
        )
        self.given = given

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple) -> torch.Tensor:
        first, starts = chunk.start - self.given, draw.step == chunk.levels[0].step
        noise = self.initial[:, :, first : first + chunk.length] if starts else next(self.path)
        assert noise.shape == shape
        return noise


@pytest.mark.parametrize("path", cases("forward"))
@torch.no_grad()
def test_golden_forward(path: Path) -> None:
    config, case = config_of(path), load_file(path)
    network = network_of(path, config)
    view = Recorder(config["start_frame"], config["frames"])
    flow = network(case["x"], case["timestep"], network.text(case["context"]), view)
    assert (flow - case["expect.flow"]).abs().max() <= 2e-5
    for layer, own in enumerate(view.layers):
        assert (own.key - case[f"expect.key.{layer}"]).abs().max() <= 2e-5
        assert (own.value - case[f"expect.value.{layer}"]).abs().max() <= 2e-5


@pytest.mark.parametrize("path", cases("rollout"))
def test_golden_rollout(path: Path) -> None:
    config, case = config_of(path), load_file(path)
    preset = Preset(
        tuple(config["steps"]),
        config["warp"],
        config["shift"],
        config["frames_per_chunk"],
        first_alone=config["independent_first_frame"],
        window=config["window_frames"],
        sink=config["sink_frames"],
    )
    assert [level.t for level in preset.chunk_levels()] == pytest.approx(
        config["timesteps"], abs=1e-4
    )
    given = config["initial_frames"]
    plan = RunPlan(
        preset, config["frames"], config["height"], config["width"], config["batch"], given
    )
    initial = case["initial"].transpose(1, 2) if given else None
    noise = Recorded(case, given)
    chunks = list(
        sample(network_of(path, config), case["context"], plan, noise=noise, initial=initial)
    )
    latents = torch.cat(([initial] if given else []) + chunks, dim=2).transpose(1, 2)
    assert next(noise.path, None) is None, "every recorded noise is drawn"
    assert (latents - case["expect.latents"]).abs().max() <= 2e-5


@pytest.mark.parametrize("path", cases("vae"))
@torch.no_grad()
def test_golden_vae(path: Path) -> None:
    config, case = config_of(path), load_file(path)
    weights = {
        name: tensor.float() for name, tensor in load_file(path.parent / config["weights"]).items()
    }
    vae = WanVAE.from_state_dict(
        weights, latent_mean=config["latent_mean"], latent_std=config["latent_std"]
    )
    assert (vae.decode(case["latents"]) - case["expect.pixels"]).abs().max() <= 1e-4
    assert (vae.encode(case["pixels"]) - case["expect.mean"]).abs().max() <= 1e-4
