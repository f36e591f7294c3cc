"""Recorded tensors of the public Self-Forcing implementation: how far this one is from them.

Cases are in tests/golden; AUTOREFINER_GOLDEN may name a folder with more.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from autorefiner.refiner.noise.source import Draw
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import Chunk, Preset
from autorefiner.refiner.wan.causal import CausalWan, KeyValue
from autorefiner.refiner.wan.fp8_linear import with_fp8
from autorefiner.refiner.wan.rope import rotate
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer
from autorefiner.refiner.wan.vae import WanVAE

FOLDERS = [Path(__file__).parent / "golden"]
if extra := os.environ.get("AUTOREFINER_GOLDEN"):
    FOLDERS.append(Path(extra))
CPU = torch.device("cpu")


def config_of(path: Path) -> dict:
    """Read the description of a case."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("config", "{}"))


def golden_files(*kinds: str) -> list[Path]:
    """List the files with cases of these kinds."""
    files = [path for folder in FOLDERS for path in sorted(folder.glob("*.safetensors"))]
    return [path for path in files if config_of(path).get("kind") in kinds]


def network_of(
    path: Path,
    config: dict,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
) -> CausalWan:
    """Load the network of a case; with `fp8`, its blocks multiply in fp8."""
    sizes = WanConfig(**config["model"])
    model = WanTransformer(sizes)
    weights = load_file(path.parent / config.get("weights", "dit_weights.safetensors"))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    network = CausalWan(model.to(device, dtype), sizes)
    return with_fp8(network) if fp8 else network


def distance(ours: Tensor, recorded: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((ours.float().cpu() - recorded).abs().max())


def relative_distance(ours: Tensor, recorded: Tensor) -> float:
    """Return the norm of the difference over the norm of what was recorded."""
    return float((ours.float().cpu() - recorded).norm() / recorded.norm())


class Recorder:
    """A view of an empty past that keeps each layer's new keys (after RoPE) and values."""

    first, frequencies = 0, None

    def __init__(self, start: int, frames: int) -> None:
        self.positions = tuple(range(start, start + frames))
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

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple) -> Tensor:
        first, starts = chunk.start - self.given, draw.step == chunk.levels[0].step
        noise = self.initial[:, :, first : first + chunk.length] if starts else next(self.path)
        assert noise.shape == shape
        return noise


@torch.no_grad()
def forward_outputs(
    path: Path, device: torch.device = CPU, dtype: torch.dtype = torch.float32, fp8: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Return our and the recorded flow, keys and values of one pass."""
    config, case = config_of(path), load_file(path)
    network = network_of(path, config, device, dtype, fp8)
    view = Recorder(config["start_frame"], config["frames"])
    x, context = (case[name].to(device, dtype) for name in ("x", "context"))
    flow = network(x, case["timestep"].to(device), network.text(context), view)
    pairs = [(flow, case["expect.flow"])]
    for layer, own in enumerate(view.layers):
        pairs.append((own.key, case[f"expect.key.{layer}"]))
        pairs.append((own.value, case[f"expect.value.{layer}"]))
    return pairs


def rollout_preset(config: dict) -> Preset:
    """Return the preset that a rollout was recorded with."""
    return Preset(
        tuple(config["steps"]),
        config["warp"],
        config["shift"],
        config["frames_per_chunk"],
        first_alone=config["independent_first_frame"],
        window=config["window_frames"],
        sink=config["sink_frames"],
    )


def rollout_outputs(
    path: Path,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    **choices,
) -> tuple[Tensor, Tensor]:
    """Return our and the recorded latents of a run; `choices` go into its RunPlan.

    Raises AssertionError unless every recorded noise is drawn.
    """
    config, case = config_of(path), load_file(path)
    given = config["initial_frames"]
    plan = RunPlan(
        rollout_preset(config), config["frames"], config["height"], config["width"],
        config["batch"], given, **choices,
    )  # fmt: skip
    initial = case["initial"].transpose(1, 2) if given else None
    network, noise = network_of(path, config, device, dtype, fp8), Recorded(case, given)
    chunks = [
        chunk.cpu()
        for chunk in sample(network, case["context"], plan, noise=noise, initial=initial)
    ]
    assert next(noise.path, None) is None, "every recorded noise is drawn"
    latents = torch.cat(([initial] if given else []) + chunks, dim=2).transpose(1, 2)
    return latents, case["expect.latents"]


@torch.no_grad()
def vae_outputs(
    path: Path, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Return our and the recorded pixels and means."""
    config, case = config_of(path), load_file(path)
    weights = load_file(path.parent / config["weights"])
    vae = WanVAE.from_state_dict(
        {name: tensor.float() for name, tensor in weights.items()},
        latent_mean=config["latent_mean"],
        latent_std=config["latent_std"],
    ).to(device, dtype)
    latents, pixels = (case[name].to(device, dtype) for name in ("latents", "pixels"))
    return [
        (vae.decode(latents), case["expect.pixels"]),
        (vae.encode(pixels), case["expect.mean"]),
    ]
