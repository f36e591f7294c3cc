"""The names that trainers give to a LoRA's tensors: PEFT, ComfyUI, diffusers, kohya, musubi and
VideoX-Fun."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .groups import REMOVED
from .layouts import DIFFUSERS_BLOCK, DIFFUSERS_PROJECTIONS, DIFFUSERS_TOP, wan_name

# PEFT puts an adapter's name between, `lora_A.default.weight`; diffusers' older names are
# `lora.down.weight`.
KEY = re.compile(
    r"(?P<stem>.+)\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.\w+)??(?:\.weight)?|alpha(?:\.default)?(?:\.weight)?)"
)
PARTS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
}
KOHYA = re.compile(r"lora_(?:unet|transformer)_+(?P<module>.+)")
LINEARS = (
    *(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"),
    "ffn.0",
    "ffn.2",
)
TOP_LINEARS = (
    "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
    "time_projection.1", "head.head",
)  # fmt: skip


def _underscored() -> dict[str, str]:
    """Wan's names by what is left of them, or of diffusers' names, when every dot is an
    underscore."""
    names = {name: name for name in (*LINEARS, *TOP_LINEARS)}
    names |= {theirs: ours for theirs, ours in DIFFUSERS_TOP.items() if ours in TOP_LINEARS}
    for ours in LINEARS:
        theirs = f".{ours}."
        for pair in DIFFUSERS_PROJECTIONS.items():
            theirs = theirs.replace(pair[1], pair[0])
        for diffusers, wan in DIFFUSERS_BLOCK.items():
            theirs = theirs.replace(f".{wan}.", f".{diffusers}.")
        names[theirs.strip(".")] = ours
    return {name.replace(".", "_"): ours for name, ours in names.items()}


UNDERSCORED = _underscored()


@dataclass(frozen=True, slots=True)
class LoraModule:
    """Stored names of a pair's tensors. `stem` is what they have in common, as patterns in a PEFT
    config match it."""

    stem: str
    parts: dict[str, str]  # "down", "up" and maybe "alpha"


def lora_modules(names: Mapping[str, str]) -> dict[str, LoraModule]:
    """LoRA pairs by Wan's module name, from a LoRA layout's names.

    Raises ValueError (without the file's name) for a tensor that is no part of a pair.
    """
    modules: dict[str, LoraModule] = {}
    for name, stored in names.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise ValueError(
                f"has {name[:120]}, which is no part of a LoRA pair: only plain LoRA files are read"
            )
        part = PARTS[match["part"]] if match["part"] else "alpha"
        module = modules.setdefault(module_name(match["stem"]), LoraModule(match["stem"], {}))
        if part in module.parts:
            other = module.parts[part]
            raise ValueError(
                f"has {stored[:120]} and {other[:120]}, two of one layer: save one LoRA alone"
            )
        module.parts[part] = stored
    for module, pair in modules.items():
        if not {"down", "up"} <= set(pair.parts):
            raise ValueError(
                f"has half a pair for {module[:120]}: the file is not complete, download it again"
            )
    return modules


def module_name(stem: str) -> str:
    """Wan's name of the layer that a LoRA's tensors are for; a name that is not known is returned
    without prefix."""
    if kohya := KOHYA.fullmatch(stem):
        return _without_underscores(kohya["module"])
    parts = stem.split(".")
    while len(parts) > 1 and parts[0] in REMOVED:
        parts.pop(0)
    return wan_name(".".join(parts) + ".weight").removesuffix(".weight")


def _without_underscores(module: str) -> str:
    """Restore the dots of `blocks_0_self_attn_q` (kohya, musubi) and of the mixture
    `blocks_0.self_attn.q`."""
    plain = module.replace(".", "_")
    block = re.fullmatch(r"(?:transformer_)?blocks_(\d+)_(.+)", plain)
    if block:
        return f"blocks.{block[1]}.{UNDERSCORED.get(block[2], block[2])}"
    return UNDERSCORED.get(plain, module)
