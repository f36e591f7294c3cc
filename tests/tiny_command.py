"""Files of a tiny model as a user has them, and the command that samples with them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from autorefiner.refiner.cli import build_parser
from autorefiner.refiner.commands.generate import options_of
from autorefiner.refiner.latents import LatentWriter
from autorefiner.refiner.request import GenerateOptions
from autorefiner.refiner.wan.vae import WanVAE

from tiny import TINY, tiny_network

FRAMES = 33  # 9 latent frames, 3 chunks


def write_files(folder: Path) -> Path:
    """Write a model, a VAE, contexts, LoRAs and latents to a folder."""
    sizes = {"text_len": TINY.text_len}
    metadata = {
        "config": json.dumps({"transformer": {"causal_ar": True, **sizes}}),
        "autorefiner": '{"preset": "self-forcing"}',
    }
    save_file(tiny_network().model.state_dict(), folder / "model.safetensors", metadata=metadata)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(WanVAE(4).state_dict(), folder / "vae.safetensors")
        save_file({"context": torch.randn(5, TINY.text_dim)}, folder / "context.safetensors")
    shapes = {"A": (2, 128), "B": (128, 2)}
    lora = {
        f"blocks.0.ffn.0.lora_{part}.weight": torch.zeros(shape) for part, shape in shapes.items()
    }
    save_file(lora, folder / "lora.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in lora.items()}, folder / "live.safetensors")
    save_file({"prompt_embeds": torch.zeros(2, 5, TINY.text_dim)}, folder / "two.safetensors")
    with LatentWriter(folder / "six.safetensors", (16, 8, 8), {}) as latents:
        latents.write(torch.zeros(1, 16, 6, 8, 8))
    return folder


def command(files: Path, out: Path, *extra: str) -> list[str]:
    """Return the arguments of `generate` for 33 frames of 48x32, and `extra` ones."""
    base = {"model": "model", "vae": "vae", "context": "context"}
    given = [
        part
        for name, stem in base.items()
        for part in (f"--{name}", str(files / f"{stem}.safetensors"))
    ]
    size = ["--frames", str(FRAMES), "--size", "48x32", "--out", str(out), "--device", "cpu"]
    return ["generate", *given, "--prompt", "a fox", *size, *extra]


def parse(arguments: list[str]) -> GenerateOptions:
    """Return the options that these arguments parse to."""
    return options_of(build_parser().parse_args(arguments))
