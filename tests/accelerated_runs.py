"""Runs of a tiny network that are made plain and accelerated."""

import torch
from torch import Tensor

from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import CausalWan

WINDOW = PRESETS["self-forcing"].changed(levels=(1000, 500), window=6, sink=1, chunk=1)
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(2))
FRAMES = 16


def clip(network: CausalWan, context=CONTEXT, preset=WINDOW, **options) -> Tensor:
    """Sample chunks of one frame, 16 of them."""
    frames = options.pop("frames", FRAMES)
    plan = {key: options.pop(key) for key in ("policy", "store", "batch") if key in options}
    return torch.cat(
        [*sample(network, context, RunPlan(preset, frames, 4, 4, **plan), **options)], 2
    )
