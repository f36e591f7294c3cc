"""Encoded clips of the world on disk: rendered once, encoded once, then read whole into memory."""

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

SHARD = 64  # clips a file
AT_ONCE = {"cpu": 4, "cuda": 32}  # clips in one pass of the encoder
FRAMES = 81
# times that a clip whose caption tells of a diagonal bounce is drawn for each of another: 1 in 30
# is one
DIAGONALS = 3


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"clips_{number:05d}.safetensors"


def shard_part(shard: int, at_once: int, index: int) -> Tensor:
    """Pixels [B, 3, F, H, W] of the part `index`, counted over all shards of `shard` clips."""
    parts = -(-shard // at_once)
    first, start = index // parts * shard, index % parts * at_once
    return clip_batch(range(first + start, first + min(start + at_once, shard)), "train", FRAMES)[0]


@torch.no_grad()
def encode_shards(vae: WanVAE, folder: Path, shards: int) -> None:
    """Write the first `shards` shards of training clips that are not there yet; seeds 0 … 64·shards
    − 1."""
    folder.mkdir(parents=True, exist_ok=True)
    device = vae.conv1.weight.device
    at_once = AT_ONCE.get(device.type, AT_ONCE["cpu"])
    parts = -(-SHARD // at_once)
    rendered = Ahead(partial(shard_part, SHARD, at_once), shards * parts, helpers(device))
    for number in tqdm(
        [n for n in range(shards) if not shard_path(folder, n).exists()], unit="shard"
    ):
        latents = []
        for index in range(number * parts, (number + 1) * parts):
            with mixed_precision(device):
                latents.append(vae.encode(rendered(index).to(device)).cpu())
        shard = {"latents": torch.cat(latents).bfloat16()}
        save_safetensors(shard_path(folder, number), shard, {"frames": str(FRAMES)})


def times_drawn(caption: Caption) -> int:
    """How often clips of a caption are drawn, for each time that most are."""
    return DIAGONALS if any(" " in (one.direction or "") for one in caption.objects) else 1


@dataclass(frozen=True, slots=True)
class Clips:
    """Latents [N, 16, F, h, w], bf16 on the CPU, and the caption of each."""

    latents: Tensor
    captions: Sequence[Caption]
    drawn: np.ndarray = field(init=False)  # indices of clips, some more often than others

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "drawn",
            np.repeat(np.arange(len(self.latents)), [*map(times_drawn, self.captions)]),
        )

    @classmethod
    def read(cls, folder: Path) -> "Clips":
        """All shards of a folder, in order; ValueError when there is none."""
        paths = sorted(folder.glob("clips_*.safetensors"))
        if not paths or [shard_path(folder, number) for number in range(len(paths))] != paths:
            raise ValueError(
                f"{folder} holds no unbroken run of encoded clips: make them with `demo train clips`"
            )
        parts = []
        for path in paths:
            with safe_open(path, "pt") as file:
                parts.append(file.get_tensor("latents"))
        latents = torch.cat(parts)
        return cls(latents, [sample_scene(seed).caption for seed in range(len(latents))])

    def batch(
        self, rng: np.random.Generator, count: int, unsaid: float, frames: int | None = None
    ) -> tuple[Tensor, list[str]]:
        """Latents [B, 16, F, h, w] in bf16, of the first `frames` or all, and a text for each."""
        chosen = rng.choice(self.drawn, count)
        return self.latents[torch.from_numpy(chosen), :, :frames], self._texts(chosen, rng, unsaid)

    def texts(self, rng: np.random.Generator, count: int) -> list[str]:
        """Texts of some of the clips."""
        return self._texts(rng.choice(self.drawn, count), rng, unsaid=0.0)

    def _texts(self, chosen: np.ndarray, rng: np.random.Generator, unsaid: float) -> list[str]:
        """New words for each caption, or none at all."""
        captions = (self.captions[index] for index in chosen)
        texts = [
            write(caption.objects, caption.relation, caption.ground, rng).text
            for caption in captions
        ]
        return ["" if rng.random() < unsaid else text for text in texts]
