"""The student's failures: its clips that miss their captions, negatives for the reward model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from safetensors import safe_open
from tqdm import tqdm

from ...wan.causal import CausalWan
from ...wan.checkpoint import save_safetensors
from ...wan.vae import WanVAE
from ..clips import BATCH, Encode, decoded, student_clips
from ..metrics.evaluate import evaluate_clip
from ..metrics.table import totals_of
from ..render import clip_batch
from ..world import sample_scene

FILE = "failures.safetensors"
FAILED = 60.0  # a clip with a lower semantic score misses its caption
FIRST = 1_000_000  # seed of the first training scene to try
MOST_TRIED = 64  # captions for each failure that is asked for
FRAMES = 81


@dataclass(frozen=True, slots=True)
class Failures:
    """Clips of training scenes [N, F, H, W, 3], uint8: true ones and the student's.

    The true ones have been through the VAE, so that both have its traces.
    """

    seeds: Sequence[int]  # of the scenes
    true: ndarray
    failed: ndarray

    @classmethod
    def read(cls, run: Path) -> "Failures | None":
        """Read the failures of a run; None if it has none."""
        if not (run / FILE).exists():
            return None
        with safe_open(run / FILE, "pt") as file:
            seeds, true, failed = (file.get_tensor(name) for name in ("seeds", "true", "failed"))
        return cls(seeds.tolist(), true.numpy(), failed.numpy())

    def write(self, run: Path) -> None:
        """Write them into a run's folder."""
        tensors = {
            "seeds": torch.tensor(self.seeds),
            "true": torch.from_numpy(self.true),
            "failed": torch.from_numpy(self.failed),
        }
        save_safetensors(run / FILE, tensors, {"failed": f"semantic below {FAILED:g}"})


@torch.no_grad()
def sample_failures(student: CausalWan, text: Encode, vae: WanVAE, number: int) -> Failures:
    """Sample training captions until `number` clips have failed, or a great many have been tried.

    ValueError if none failed.
    """
    device = vae.conv1.weight.device
    seeds, true, failed = [], [], []
    end = FIRST + MOST_TRIED * number
    bar = tqdm(total=number, unit="failure", dynamic_ncols=True)
    for first in range(FIRST, end, BATCH):
        if len(seeds) == number:
            break
        scenes = range(first, min(first + BATCH, end))
        captions = [sample_scene(seed).caption for seed in scenes]
        clips = student_clips(student, text, vae, captions, seed=first)
        for seed, caption, clip in zip(scenes, captions, clips, strict=True):
            semantic = totals_of(evaluate_clip(clip, caption))["semantic"]
            if semantic < FAILED and len(seeds) < number:
                pixels = clip_batch([seed], "train", FRAMES)[0].to(device)
                seeds.append(seed)
                true += decoded(vae, vae.encode(pixels))
                failed.append(clip)
                bar.update()
    bar.close()
    if not seeds:
        raise ValueError(
            f"the student missed none of {end - FIRST} captions: train the reward model without"
            " failures"
        )
    return Failures(seeds, np.stack(true), np.stack(failed))
