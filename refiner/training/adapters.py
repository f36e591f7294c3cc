"""Trainable LoRA branches (peft): a refiner's, with a silent final layer, and a plain LoRA's.

Both are a second module tree that shares the base's parameters. The base stays as it is, no pass
switches adapters on or off, and checkpointed regions recompute the same values.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..noise.refiner import HEAD, TARGETS, shared_copy
from ..wan.causal import CausalWan
from ..wan.lora import LoraPair
from .distributed import whole

Start = Literal["head", "flow", "random"]
FLOW_SHARE = 0.03  # c of start "flow"
PIP_LINE = 'pip install "peft>=0.17" (or pip install "autorefiner[train]")'


def attach_branches(
    base: CausalWan, rank: int, *, silent_head: bool, start: Start = "random",
    flow_share: float = FLOW_SHARE, seed: int = 0,
) -> CausalWan:  # fmt: skip
    """Add trainable LoRA branches (alpha = rank, B zero) to the frozen base.

    With `silent_head` the result is T_φ: the final layer's base weight and bias count as zero.
    `start` "head" then gives that layer a branch of rank 64, whatever `rank` is, with A set to the
    base's weight: B = -c I yields Δ = -c v, which the first update can reach. "flow" begins there,
    with c = `flow_share`: through a B of zero no gradient reaches the other branches. ValueError if
    peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"training a LoRA needs peft: {PIP_LINE}") from error
    if rank < 1:
        raise ValueError(f"rank {rank}: give at least 1")
    model = shared_copy(base.model.requires_grad_(False))
    head_weight = model.head.head.weight
    from_head = silent_head and start != "random"
    if silent_head:
        for name in ("weight", "bias"):
            zeros = torch.zeros_like(getattr(model.head.head, name))
            setattr(model.head.head, name, nn.Parameter(zeros, requires_grad=False))
    head = len(head_weight) if from_head else min(rank, len(head_weight))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=TARGETS.pattern,
        rank_pattern={HEAD: head}, alpha_pattern={HEAD: head},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    if from_head:
        branch = model.get_submodule(HEAD)
        with torch.no_grad():
            branch.lora_A["default"].weight.copy_(head_weight)
            if start == "flow":
                nn.init.eye_(branch.lora_B["default"].weight).mul_(-flow_share)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return replace(base, model=model)


def branch_parameters(network: CausalWan) -> dict[str, nn.Parameter]:
    """Return the trainable factors by name."""
    return {
        name: parameter
        for name, parameter in network.model.named_parameters()
        if parameter.requires_grad
    }


def pairs_of(
    network: CausalWan, factors: Mapping[str, Tensor] | None = None
) -> dict[str, LoraPair]:
    """Return detached, unsharded LoRA pairs by layer: the current factors, or those given."""
    factors = branch_parameters(network) if factors is None else factors
    pairs = {}
    for name, module in network.model.named_modules():
        if hasattr(module, "lora_A"):
            names = (f"{name}.{factor}.default.weight" for factor in ("lora_A", "lora_B"))
            down, up = (whole(factors[each].detach()).clone() for each in names)
            pairs[name] = LoraPair(down, up, module.scaling["default"])
    return pairs
