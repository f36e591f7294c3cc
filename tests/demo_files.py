"""Files of the demo bundle's kind, tiny and of random weights, for tests that must not wait for the real ones."""

from pathlib import Path

import torch

from autorefiner.refiner.demo.bundle import save_model
from autorefiner.refiner.demo.text_encoder import SpriteTextEncoder
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
