"""Tiny stand-ins with random weights for the demo bundle's files."""

import shutil
from pathlib import Path

import numpy as np
import torch

from autorefiner.refiner.bundles import BUNDLES, DEMO, sprites
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.demo.bundle import FILES, REFINERS, save_model
from autorefiner.refiner.demo.reward_model import SpriteVideoText
from autorefiner.refiner.demo.text_encoder import SpriteTextEncoder
from autorefiner.refiner.demo.tiny_decoder import SpriteTinyDecoder
from autorefiner.refiner.noise.file import RefinerCard, fingerprint, save_refiner
from autorefiner.refiner.noise.refiner import target_modules
from autorefiner.refiner.pictures import write_png
from autorefiner.refiner.wan.lora import LoraPair
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer
from autorefiner.refiner.wan.vae import WanVAE

STAND_IN = WanConfig(dim=128, num_heads=2, ffn_dim=128, num_layers=2, text_dim=32, text_len=16)
VAE_DIM = 4


def write_demo_files(folder: Path) -> Path:
    """Write stand-ins for the models of FILES and the refiner to `folder`; return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_model(folder, "vae", WanVAE(VAE_DIM), None, {})
        save_model(
            folder, "text", SpriteTextEncoder(STAND_IN.text_dim, STAND_IN.text_len), None, {}
        )
        student = WanTransformer(STAND_IN)
        save_model(folder, "student", student, STAND_IN, {"preset": "self-forcing"})
        save_model(folder, "teacher", WanTransformer(STAND_IN), STAND_IN, {})
        save_model(
            folder, "reward", SpriteVideoText(16, STAND_IN.text_dim, STAND_IN.text_len), None, {}
        )
        save_model(folder, "tiny", SpriteTinyDecoder(4), None, {})
    write_refiner(folder / REFINERS["sprites"], base=fingerprint(student))
    return folder


def use_demo_files(folder: Path, monkeypatch) -> None:
    """Use the files of a folder in place of the bundled ones."""
    monkeypatch.setattr(bundle, "WEIGHTS", folder)
    monkeypatch.setitem(BUNDLES, DEMO, sprites(folder))


def random_pairs(config: WanConfig = STAND_IN, scale: float = 0.1) -> dict[str, LoraPair]:
    """Return random factors of rank 2; scale 0 gives those of a fresh refiner."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        targets = target_modules(WanTransformer(config))
    shapes = {name: module.weight.shape for name, module in targets.items()}
    made = {}
    for name, (out, into) in shapes.items():
        down, up = (
            torch.randn(2, into, generator=generator),
            torch.randn(out, 2, generator=generator),
        )
        made[name] = LoraPair(0.1 * down, scale * up, 1.0)
    return made


def write_refiner(
    path: Path, config: WanConfig = STAND_IN, scale: float = 0.1, **card: object
) -> Path:
    """Write a refiner file with random factors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_refiner(path, random_pairs(config, scale), RefinerCard(rank=2, **card))
    return path


def write_base(base: Path, weights: Path) -> None:
    """Create ComfyUI's models/ and input/ in `base`, stand-ins under the workflows' file names."""
    named = {
        "diffusion_models/self_forcing_dmd.pt": "student",
        "diffusion_models/longlive_base.pt": "student",
        "diffusion_models/krea-realtime-video-14b.safetensors": "student",
        "vae/wan_2.1_vae.safetensors": "vae",
    }
    for name, kind in named.items():
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights / FILES[kind], path)
    loras = base / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    shutil.copy(weights / REFINERS["sprites"], loras / "self_forcing.refiner.safetensors")
    (base / "input").mkdir(exist_ok=True)
    picture = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    write_png(picture, base / "input" / "example.png")
