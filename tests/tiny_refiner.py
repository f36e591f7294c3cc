"""Random refiner factors for tests."""

import torch

from autorefiner.refiner.noise.refiner import target_modules
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.lora import LoraPair

RANK = 4


def pairs_for(network: CausalWan, fresh: bool = False, seed: int = 1) -> dict[str, LoraPair]:
    """Return random LoRA factors for every target module; with `fresh`, every B is zero."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in target_modules(network.model).items():
        out, into = module.weight.shape
        up = torch.zeros(out, RANK) if fresh else torch.randn(out, RANK, generator=generator) * 0.1
        made[name] = LoraPair(torch.randn(RANK, into, generator=generator) * 0.1, up, 1.0)
    return made
