"""Sample sheets of a refiner's training: clips of base and refiner from the same noise."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..noise.refiner import Refiner, merged
from ..pictures import contact_sheet
from ..sample import RunPlan, sample
from ..video import to_frames
from ..wan.causal import CausalWan
from ..wan.vae import WanVAE
from .refiner_stage import RefinerStage

PROMPTS = 4  # per sheet
FRAMES = 8  # per clip

Show = Callable[[RefinerStage, Path, int], dict[str, float]]  # stage, folder, step -> scores


def trained(stage: RefinerStage, base: CausalWan) -> tuple[CausalWan, Refiner | None]:
    """Return base and averaged refiner; for method lora, the merged network and None."""
    pairs = stage.average()
    if stage.options.method == "lora":
        return merged(base, pairs, silent_head=False), None
    return base, Refiner(merged(base, pairs), stage.options.cache, stage.options.refined)


def gather_only(stage: RefinerStage, folder: Path, index: int) -> dict[str, float]:
    """Help gather the sharded average for the sheet that the first process draws."""
    stage.average()
    return {}


@dataclass(frozen=True, slots=True)
class Sheets:
    """Draws a clip of each prompt by the base, and below it by the trained refiner."""

    base: CausalWan
    encode: Callable[[list[str]], Tensor]
    vae: WanVAE
    prompts: list[str]

    @torch.no_grad()
    def __call__(self, stage: RefinerStage, folder: Path, index: int) -> dict[str, float]:
        network, refiner = trained(stage, self.base)
        options, frames = stage.options, []
        plan = RunPlan(options.preset, options.frames, options.height, options.width)
        for prompt in self.prompts:
            context = self.encode([prompt])
            for sampled, refined in ((self.base, None), (network, refiner)):
                latents = torch.cat(list(sample(sampled, context, plan, refiner=refined)), dim=2)
                clip = to_frames(self.vae.decode(latents))
                frames += [*clip[:: max(1, len(clip) // FRAMES)][:FRAMES]]
        contact_sheet(frames, folder / f"sheet_{index:06d}.png")
        return {}
