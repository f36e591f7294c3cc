"""A tiny network with fixed random weights."""

import torch

from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer

TINY = WanConfig(dim=128, num_heads=1, ffn_dim=128, num_layers=2, text_dim=32, text_len=8)


def tiny_network(
    config: WanConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float32, **options
) -> CausalWan:
    """Return a network with random weights; `options` go to CausalWan."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanTransformer(config).to(dtype)
    return CausalWan(model, config, **options)
