"""Names of LoRA tensors as written by PEFT, ComfyUI, diffusers, kohya, musubi and VideoX-Fun."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .groups import REMOVED
from .layouts import DIFFUSERS_BLOCK, DIFFUSERS_PROJECTIONS, DIFFUSERS_TOP, wan_name

# PEFT inserts an adapter's name, `lora_A.default.weight`; diffusers' older names are
# `lora.down.weight`.
KEY = re.compile(
    r"(?P<stem>.+)\."
    r"(?:(?P<matrix>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.\w+)??(?:\.weight)?"
    r"|alpha(?:\.default)?(?:\.weight)?)"
)
MATRICES = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
}
KOHYA = re.compile(r"lora_(?:unet|transformer)_+(?P<module>.+)")
LINEARS = (
    *(f"{kind}_attn.{projection}" for kind in ("self", "cross") for projection in "qkvo"),
    "ffn.0",
    "ffn.2",
)
TOP_LINEARS = (
    "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0",
    "time_embedding.2", "time_projection.1", "head.head",
)  # fmt: skip


def _underscored() -> dict[str, str]:
    """Map Wan's and diffusers' names, with underscores for dots, to Wan's names."""
    names = {name: name for name in (*LINEARS, *TOP_LINEARS)}
    names |= {theirs: ours for theirs, ours in DIFFUSERS_TOP.items() if ours in TOP_LINEARS}
    for ours in LINEARS:
        theirs = f".{ours}."
        for diffusers, wan in DIFFUSERS_PROJECTIONS.items():
            theirs = theirs.replace(wan, diffusers)
        for diffusers, wan in DIFFUSERS_BLOCK.items():
            theirs = theirs.replace(f".{wan}.", f".{diffusers}.")
        names[theirs.strip(".")] = ours
    return {name.replace(".", "_"): ours for name, ours in names.items()}


UNDERSCORED = _underscored()


@dataclass(frozen=True, slots=True)
class LoraModule:
    """Stored names of a pair's tensors, and their common `stem`, which PEFT's patterns match."""

    stem: str
    parts: dict[str, str]  # "down", "up" and maybe "alpha"


def lora_modules(names: Mapping[str, str]) -> dict[str, LoraModule]:
    """Group a LoRA layout's tensors into pairs by Wan's module name.

    Raises ValueError (without the file's name) for a tensor outside a pair, or half a pair.
    """
    modules: dict[str, LoraModule] = {}
    for name, stored in names.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise ValueError(
                f"has {name[:120]}, which is no part of a LoRA pair: only plain LoRA files are read"
            )
        role = MATRICES[match["matrix"]] if match["matrix"] else "alpha"
        module = modules.setdefault(module_name(match["stem"]), LoraModule(match["stem"], {}))
        if role in module.parts:
            other = module.parts[role]
            raise ValueError(
                f"has {stored[:120]} and {other[:120]}, two of one layer: save one LoRA alone"
            )
        module.parts[role] = stored
    for module, pair in modules.items():
        if not {"down", "up"} <= set(pair.parts):
            raise ValueError(
                f"has half a pair for {module[:120]}: the file is not complete, download it again"
            )
    return modules


def module_name(stem: str) -> str:
    """Return Wan's name of a LoRA's layer; an unknown name only loses its prefix."""
    if kohya := KOHYA.fullmatch(stem):
        return _without_underscores(kohya["module"])
    keys = stem.split(".")
    while len(keys) > 1 and keys[0] in REMOVED:
        keys.pop(0)
    return wan_name(".".join(keys) + ".weight").removesuffix(".weight")


def _without_underscores(module: str) -> str:
    """Restore the dots of `blocks_0_self_attn_q` (kohya) and of `blocks_0.self_attn.q` (musubi)."""
    plain = module.replace(".", "_")
    block = re.fullmatch(r"(?:transformer_)?blocks_(\d+)_(.+)", plain)
    if block:
        return f"blocks.{block[1]}.{UNDERSCORED.get(block[2], block[2])}"
    return UNDERSCORED.get(plain, module)
