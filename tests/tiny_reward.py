"""Tiny models for reward tests: a reward and a verifier without networks, a CLIP, and a VAE."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autorefiner.refiner.schedule import Chunk
from autorefiner.refiner.training.rewards.reward import FrameDraw
from autorefiner.refiner.wan.vae import WanVAE

CLIP = FrameDraw(2, 3)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


@dataclass(frozen=True)
class Brightness:
    """The mean of the frames times `scale`, which may leave its declared range."""

    name: str = "brightness"
    scale: float = 1.0
    range: tuple[float, float] = (0.0, 1.0)
    frames: FrameDraw = CLIP

    def __call__(self, frames: Tensor, numbers: Sequence[int], prompts: Sequence[str]) -> Tensor:
        assert frames.shape[1] == len(numbers)
        return self.scale * frames.float().mean(dim=(1, 2, 3, 4))


@dataclass(frozen=True)
class Scored:
    """A stateless verifier that scores latents by a function."""

    function: Callable[[Tensor], Tensor]

    def begin(self) -> "Scored":
        return self

    def score(self, x0: Tensor, chunk: Chunk) -> Tensor:
        return self.function(x0)

    def keep(self, x0: Tensor, chunk: Chunk) -> None:
        pass


indifferent = Scored(lambda x0: torch.zeros(len(x0)))


def tiny_vae() -> WanVAE:
    """Return a frozen VAE with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanVAE(4).requires_grad_(False)


def write_clip(folder: Path) -> Path:
    """Write a CLIP with random weights as transformers saves it; return the folder."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(
        json.dumps({word: number for number, word in enumerate(words)})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12}
    tokenizer |= dict(
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = transformers.CLIPConfig(
        text_config=TOWER
        | dict(vocab_size=len(words), max_position_embeddings=12, bos_token_id=52, eos_token_id=53),
        vision_config=TOWER | dict(image_size=16, patch_size=8),
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder, safe_serialization=True)
    pictures = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, resample=3)
    pictures |= dict(image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder
