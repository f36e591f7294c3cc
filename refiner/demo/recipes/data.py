"""Encoded clips of the world: rendered and encoded once, stored in shards, read into memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ...training.ahead import Ahead, helpers
from ...training.precision import mixed_precision
from ...wan.checkpoint import save_safetensors
from ...wan.vae import WanVAE
from ..captions import Caption, write
from ..render import clip_batch
from ..world import sample_scene

SHARD = 64  # clips per file
AT_ONCE = {"cpu": 4, "cuda": 32}  # clips per pass of the encoder
FRAMES = 81
DIAGONALS = 3  # weight of clips with a diagonal bounce, which are 1 in 30


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"clips_{number:05d}.safetensors"


def shard_part(shard: int, at_once: int, index: int) -> Tensor:
    """Render pixels [B, 3, F, H, W] of batch `index`, counted over all shards of `shard` clips."""
    batches = -(-shard // at_once)
    first, start = index // batches * shard, index % batches * at_once
    return clip_batch(range(first + start, first + min(start + at_once, shard)), "train", FRAMES)[0]


@torch.no_grad()
def encode_shards(vae: WanVAE, folder: Path, shards: int) -> None:
    """Write those of the first `shards` shards that are missing: seeds 0 … 64·shards − 1."""
    folder.mkdir(parents=True, exist_ok=True)
    device = vae.conv1.weight.device
    at_once = AT_ONCE.get(device.type, AT_ONCE["cpu"])
    batches = -(-SHARD // at_once)
    rendered = Ahead(partial(shard_part, SHARD, at_once), shards * batches, helpers(device))
    missing = [number for number in range(shards) if not shard_path(folder, number).exists()]
    for number in tqdm(missing, unit="shard"):
        latents = []
        for index in range(number * batches, (number + 1) * batches):
            with mixed_precision(device):
                latents.append(vae.encode(rendered(index).to(device)).cpu())
        shard = {"latents": torch.cat(latents).bfloat16()}
        save_safetensors(shard_path(folder, number), shard, {"frames": str(FRAMES)})


def times_drawn(caption: Caption) -> int:
    """Return the weight of a caption's clips in a draw."""
    return DIAGONALS if any(" " in (one.direction or "") for one in caption.objects) else 1


@dataclass(frozen=True, slots=True)
class Clips:
    """Latents [N, 16, F, h, w], bf16 on the CPU, and the caption of each."""

    latents: Tensor
    captions: Sequence[Caption]
    drawn: np.ndarray = field(init=False)  # indices of clips, repeated by their weight

    def __post_init__(self) -> None:
        weights = [*map(times_drawn, self.captions)]
        object.__setattr__(self, "drawn", np.repeat(np.arange(len(self.latents)), weights))

    @classmethod
    def read(cls, folder: Path) -> "Clips":
        """Read all shards of a folder; ValueError if there are none, or some are missing."""
        paths = sorted(folder.glob("clips_*.safetensors"))
        if not paths or [shard_path(folder, number) for number in range(len(paths))] != paths:
            raise ValueError(
                f"{folder} holds no unbroken run of encoded clips:"
                " make them with `demo train clips`"
            )
        shards = []
        for path in paths:
            with safe_open(path, "pt") as file:
                shards.append(file.get_tensor("latents"))
        latents = torch.cat(shards)
        return cls(latents, [sample_scene(seed).caption for seed in range(len(latents))])

    def batch(
        self, rng: np.random.Generator, count: int, unsaid: float, frames: int | None = None
    ) -> tuple[Tensor, list[str]]:
        """Draw bf16 latents [B, 16, F, h, w], of the first `frames` or all, and their texts."""
        chosen = rng.choice(self.drawn, count)
        return self.latents[torch.from_numpy(chosen), :, :frames], self._texts(chosen, rng, unsaid)

    def texts(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draw texts of clips."""
        return self._texts(rng.choice(self.drawn, count), rng, unsaid=0.0)

    def _texts(self, chosen: np.ndarray, rng: np.random.Generator, unsaid: float) -> list[str]:
        """Rewrite each caption in new words, or leave it empty with probability `unsaid`."""
        captions = (self.captions[index] for index in chosen)
        texts = [
            write(caption.objects, caption.relation, caption.ground, rng).text
            for caption in captions
        ]
        return ["" if rng.random() < unsaid else text for text in texts]
