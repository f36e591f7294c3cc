"""Trainable LoRA branches, by peft: a refiner's, whose final layer is silenced, and the plain LoRA
that is its control.

Both are a second tree of modules over the base's own parameters, so the base never knows, no pass
has to switch anything on or off, and a checkpointed region recomputes what it computed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..noise.refiner import HEAD, TARGETS, check_pairs, shared_copy
from ..wan.causal import CausalWan
from ..wan.lora import LoraPair
from .distributed import whole

Start = Literal["head", "random"]
PIP_LINE = 'pip install "peft>=0.17" (or pip install "autorefiner[train]")'


def attach_branches(
    base: CausalWan, rank: int, *, silent_head: bool, start: Start = "random", seed: int = 0
) -> CausalWan:
    """A tree over the base's frozen parameters with fresh LoRA branches (rank = alpha, B zero),
    which are trainable.

    With `silent_head` it is T_φ: the final layer's base weight and bias count as zero. `start`
    "head" then gives that layer a branch of rank 64, whatever `rank` is, whose A is the base's
    weight: B = -c I is Δ = -c v, within reach of the first update. ValueError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"training a LoRA needs peft: {PIP_LINE}") from error
    if rank < 1:
        raise ValueError(f"rank {rank}: give at least 1")
    model = shared_copy(base.model.requires_grad_(False))
    head_weight = model.head.head.weight
    from_head = silent_head and start == "head"
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
        with torch.no_grad():
            model.get_submodule(HEAD).lora_A["default"].weight.copy_(head_weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return replace(base, model=model)


def branch_parameters(network: CausalWan) -> dict[str, nn.Parameter]:
    """The trainable factors by name."""
    return {
        name: parameter
        for name, parameter in network.model.named_parameters()
        if parameter.requires_grad
    }


def pairs_of(
    network: CausalWan, factors: Mapping[str, Tensor] | None = None
) -> dict[str, LoraPair]:
    """The factors by layer with their scale, detached and whole: as they stand, or others by
    parameter name."""
    factors = branch_parameters(network) if factors is None else factors
    pairs = {}
    for name, module in network.model.named_modules():
        if hasattr(module, "lora_A"):
            names = (f"{name}.{part}.default.weight" for part in ("lora_A", "lora_B"))
            down, up = (whole(factors[each].detach()).clone() for each in names)
            pairs[name] = LoraPair(down, up, module.scaling["default"])
    return pairs


@torch.no_grad()
def load_pairs(network: CausalWan, pairs: Mapping[str, LoraPair], base: CausalWan) -> None:
    """Go on from factors; ValueError unless they are of this tree's layers and ranks."""
    check_pairs(pairs, base.model)
    for name, module in network.model.named_modules():
        if hasattr(module, "lora_A"):
            for part, tensor in (
                ("lora_A", pairs[name].down),
                ("lora_B", pairs[name].up * pairs[name].scale),
            ):
                own = getattr(module, part)["default"].weight
                if own.shape != tensor.shape:
                    raise ValueError(
                        f"{name} has rank {len(pairs[name].down)}, not {own.shape}: use its own rank"
                    )
                own.copy_(tensor / (module.scaling["default"] if part == "lora_B" else 1))
