"""LoRAs for tests: their tensors, and the weights that merging them must give."""

import re

import torch
from published import State
from torch import Tensor

LINEAR = re.compile(r"(blocks\.\d+\.(?:self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02]))\.weight")


def make_lora(state: State, rank: int, form: str = "base_model.model.{}.lora_{}.weight") -> State:
    generator = torch.Generator().manual_seed(7)
    lora = {}
    for name, weight in state.items():
        if match := LINEAR.fullmatch(name):
            lora[form.format(match[1], "A")] = (
                torch.randn(rank, weight.shape[1], generator=generator) / 16
            )
            lora[form.format(match[1], "B")] = (
                torch.randn(weight.shape[0], rank, generator=generator) / 16
            )
    return lora


def merged(state: State, lora: State, scale: float = 1.0) -> State:
    def with_lora(name: str, weight: Tensor) -> Tensor:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in lora:
            return weight
        delta = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
        return (weight.float() + scale * delta).to(weight.dtype)

    return {name: with_lora(name, weight) for name, weight in state.items()}
