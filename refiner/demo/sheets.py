"""Sample sheets of a refiner's training on the sprites: held-out captions with exact scores."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..training.refiner_stage import RefinerStage
from ..training.sheets import trained
from ..wan.causal import CausalWan
from ..wan.vae import WanVAE
from .clips import SHOWN, Encode, held_out, show_clips, student_clips


@dataclass(frozen=True, slots=True)
class SpriteSheets:
    """Draws clips by the base above those by the trained refiner, and scores the latter."""

    base: CausalWan
    encode: Encode
    vae: WanVAE

    @torch.no_grad()
    def __call__(self, stage: RefinerStage, folder: Path, index: int) -> dict[str, float]:
        network, refiner = trained(stage, self.base)
        captions, preset = held_out(stage.options.shown), stage.options.preset
        models = self.encode, self.vae
        before = [*student_clips(self.base, *models, captions[:SHOWN], preset=preset)]
        clips = student_clips(network, *models, captions, preset=preset, refiner=refiner)
        return show_clips(clips, captions, folder, index, before)
