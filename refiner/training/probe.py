"""Check a training's gradient for a signal before it takes hours (`autorefiner train --probe`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from tqdm import trange

from ..noise.refiner import HEAD
from .gradient_signal import ADVICE, Agreement, agreement, flat
from .refiner_stage import RefinerStage

FEWEST = 3  # batches
APART = 1 << 32  # offset of the probe's step indices, beyond any training's
FINAL, OTHERS = "final layer", "others"


@dataclass(frozen=True, slots=True)
class Probe:
    """Measurements of a stage's gradient and residuals."""

    batches: int
    clips: int  # per batch
    signal: Agreement  # of the whole gradient, most of which is often the final layer's
    parts: Mapping[str, Agreement]  # of the final layer and of all others; empty for a zero one
    figures: Mapping[str, float]  # a step's logged figures, as means over batches
    held_out: float | None  # None where no prompts are held out

    @property
    def seen(self) -> bool:
        """Whether any part of the gradient has a significant signal."""
        return any(part.seen for part in (self.signal, *self.parts.values()))

    def lines(self) -> list[str]:
        """Format the probe for the terminal, with advice."""
        signal = self.signal
        rows = [
            f"gradient    mean cosine {signal.cosine:+.4f} ± {signal.error:.4f} between"
            f" {self.batches} batches of {self.clips} clips,"
            f" signal / total power {signal.share:+.4f}"
        ]
        for name in (FINAL, OTHERS):
            part = self.parts.get(name)
            cosine = f"mean cosine {part.cosine:+.4f} ± {part.error:.4f}" if part else "no gradient"
            rows.append(f"  {name:<11} {cosine}")
        steps = [name.partition(" ")[2] for name in self.figures if name.startswith("rms ")]
        for step in steps:
            row = (
                f"{name} {self.figures[f'{name} {step}']:+.4f}"
                for name in ("rms", "constant", "shrink")
            )
            rows.append(f"Δ at {step:<6} {', '.join(row)}")
        if self.held_out is None:
            rows.append("held-out    no prompts are held out: give at least 10")
        else:
            rows.append(f"held-out    gain over the base {self.held_out:+.5f}")
        rows.append("signal      yes" if self.seen else f"signal      none: {ADVICE}")
        return rows


def probe(stage: RefinerStage, batches: int) -> Probe:
    """Compare the gradients of independent batches; the stage does not change.

    ValueError for fewer than 3 batches.
    """
    if batches < FEWEST:
        raise ValueError(f"{batches} batches: give at least {FEWEST}, whose gradients are compared")
    factors = {FINAL: [], OTHERS: []}
    for name, factor in stage.factors.items():
        factors[FINAL if name.startswith(HEAD) else OTHERS].append(factor)
    gradients = {part: [] for part in factors}
    figures = []
    for number in trange(batches, unit="batch", dynamic_ncols=True):
        figures.append(stage.gradient(APART + number).floats())
        for part, factors_of_part in factors.items():
            gradients[part].append(flat(factor.grad for factor in factors_of_part))
    stage.learner.zero_grad()
    # batches may end at different levels, and then log different names
    logged = dict.fromkeys(name for each in figures for name in each)
    means = {name: fmean(each[name] for each in figures if name in each) for name in logged}
    clips = stage.options.batch * stage.options.accumulation
    stacked = {part: torch.stack(each) for part, each in gradients.items()}
    signal = agreement(torch.cat([*stacked.values()], dim=1))
    parts = {part: agreement(each) for part, each in stacked.items() if each.any()}
    return Probe(batches, clips, signal, parts, means, stage.compare().get("held-out"))
