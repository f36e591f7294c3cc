"""Files of the demo bundle's kind, tiny and of random weights, for tests that must not wait for the real ones."""

import shutil
from pathlib import Path

import numpy as np
import torch

from autorefiner.refiner.demo.bundle import FILES, save_model
from autorefiner.refiner.demo.text_encoder import SpriteTextEncoder
from autorefiner.refiner.video import write_png
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer
from autorefiner.refiner.wan.vae import WanVAE

STAND_IN = WanConfig(dim=128, num_heads=2, ffn_dim=128, num_layers=2, text_dim=32, text_len=16)
VAE_DIM = 4


def write_demo_files(folder: Path) -> Path:
    """sprites_{vae,text,student}.safetensors in `folder`, which is returned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_model(folder, "vae", WanVAE(VAE_DIM), None, {})
        save_model(folder, "text", SpriteTextEncoder(STAND_IN.text_dim, STAND_IN.text_len), None, {})
        save_model(folder, "student", WanTransformer(STAND_IN), STAND_IN, {"preset": "self-forcing"})
    return folder


def write_base(base: Path, weights: Path) -> None:
    """In `base`, ComfyUI's models/ and input/ with the files that the workflows name, the stand-ins in their place."""
    named = {"diffusion_models/self_forcing_dmd.pt": "student", "vae/wan_2.1_vae.safetensors": "vae"}
    for name, kind in named.items():
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights / FILES[kind], path)
    (base / "input").mkdir(exist_ok=True)
    picture = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    write_png(picture, base / "input" / "example.png")
