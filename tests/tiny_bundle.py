"""Tiny random models in the place of the demo's, for tests of training; as a script, a training of several processes.

torchrun --nproc-per-node 2 tests/tiny_bundle.py MODELS CONFIG.toml …
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from autorefiner.refiner import train as training
from autorefiner.refiner.cli import main
from autorefiner.refiner.demo.bundle import save_model
from autorefiner.refiner.demo.reward_model import SpriteVideoText
from autorefiner.refiner.demo.text_encoder import SpriteTextEncoder
from autorefiner.refiner.training.distributed import distributed
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer
from autorefiner.refiner.wan.vae import WanVAE

SIZES = WanConfig(dim=32, num_heads=2, ffn_dim=32, num_layers=2, text_dim=16, text_len=32)


def write_tiny_bundle(models: Path) -> None:
    """Write a bundle's files, all but the refiner's."""
    torch.manual_seed(0)
    save_model(models, "vae", WanVAE(4), None, {})
    save_model(models, "text", SpriteTextEncoder(16), None, {})
    for name in ("teacher", "student"):
        save_model(models, name, WanTransformer(SIZES), SIZES, {})
    save_model(models, "reward", SpriteVideoText(16, 16), None, {})


def use_bundle(models: Path, put: Callable[[object, str, object], None] = setattr) -> None:
    """Have trainings load their models from there; `put` sets an attribute of a module."""
    for name in ("load_sprite_vae", "load_sprite_text"):
        loaded = getattr(training, name)(models)
        put(training, name, lambda loaded=loaded: loaded)
    load, reward = training.load_sprite_network, training.load_sprite_reward
    put(training, "load_sprite_reward", lambda frames, device: reward(models, frames, device))
    put(training, "load_sprite_network", lambda name, device: load(name, models, device))
    put(training, "SPRITE_PROMPTS", 8)
    put(training, "WEIGHTS", models)


if __name__ == "__main__":
    use_bundle(Path(sys.argv[1]))
    with distributed(torch.device("cpu")):
        sys.exit(max(main(["train", path, "--device", "cpu"]) for path in sys.argv[2:]))
