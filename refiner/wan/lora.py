"""LoRA files of a Wan2.1 transformer: read, check against the model, merge, and save."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .layouts import choose_top_key, read_layout
from .lora_names import lora_modules
from .lora_scale import StatedScale, stated_scale
from .weight_file import WeightFile, open_weights, save_safetensors

LINEARS_OF_A_BLOCK = 10  # 4 of self-attention, 4 of cross-attention, 2 of the feed-forward


@dataclass(frozen=True, slots=True)
class LoraPair:
    """A weight's change scale · up · down; down [rank, in] and up [out, rank] as stored."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Add this LoRA to a weight [out, in], in fp32, on the weight's device."""
        up = self.up.to(weight.device).float()
        down = self.down.to(weight.device).float()
        return weight.float() + strength * self.scale * (up @ down)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA's file or folder, and the strength to merge it with."""

    path: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not -100 <= self.strength <= 100:
            raise ValueError(
                f"strength {self.strength} of {self.path}: give a number from -100 to 100, like 0.8"
            )

    @classmethod
    def parse(cls, text: str) -> "LoraFile":
        """Parse FILE or FILE:STRENGTH; an existing file of that whole name takes precedence."""
        path, colon, strength = text.rpartition(":")
        if not colon or not path or os.path.exists(text):
            return cls(Path(text))
        try:
            number = float(strength)
        except ValueError as error:
            if strength[:1].isdecimal():
                raise ValueError(
                    f"LoRA {text!r}: give FILE or FILE:STRENGTH, like style.safetensors:0.8"
                ) from error
            return cls(Path(text))
        return cls(Path(path), number)

    def describe(self) -> str:
        """Return its name, with the strength unless it is 1."""
        return self.path.name if self.strength == 1 else f"{self.path.name}:{self.strength:g}"


def read_lora(path: Path | str) -> dict[str, LoraPair]:
    """Read a LoRA file or PEFT folder as {module: pair}, in any naming that lora_names.py knows.

    The scale is alpha / rank where the file has alpha, else the one stated by its metadata or the
    adapter_config.json beside it, else 1. Data stays mapped. Raises ValueError in one line.
    """
    file = open_weights(path)
    try:
        group = choose_top_key(file.groups, "auto", "generator_lora")
        layout = read_layout(file.groups[group])
        if layout.kind == "refiner":
            raise ValueError("is a refiner and not a LoRA: pass it with --refiner")
        if layout.kind != "lora":
            raise ValueError(
                f"is not a LoRA but a file of kind {layout.kind!r}:"
                " pass LongLive's lora.pt or the like"
            )
        stated = stated_scale(Path(path), file.metadata) or StatedScale()
        pairs = read_pairs(file, group, layout.names, stated)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return pairs


def read_pairs(
    file: WeightFile, group: str, names: Mapping[str, str], stated: StatedScale
) -> dict[str, LoraPair]:
    """Read a group's LoRA tensors as {module: pair}; `names` maps bare names to stored ones.

    Raises ValueError (without the file's name) for tensors that do not form pairs.
    """
    pairs = {}
    for module, stored in lora_modules(names).items():
        down = file.read(group, stored.parts["down"])
        up = file.read(group, stored.parts["up"])
        if down.ndim != 2 or up.ndim != 2 or not len(down) or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"has matrices of {list(up.shape)} and {list(down.shape)} for {module}:"
                " they do not multiply"
            )
        scale = stated.scale(stored.stem, len(down))
        if "alpha" in stored.parts:
            scale = _alpha(file.read(group, stored.parts["alpha"]), module) / len(down)
        pairs[module] = LoraPair(down, up, scale)
    return pairs


def _alpha(stored: Tensor, module: str) -> float:
    if stored.numel() != 1:
        raise ValueError(
            f"has an alpha of {list(stored.shape)} for {module}, which is one number: it is damaged"
        )
    return stored.item()


def save_lora(path: Path | str, pairs: Mapping[str, LoraPair], metadata: Mapping[str, str]) -> None:
    """Write a LoRA that ComfyUI's own loaders read, with the scale folded into B."""
    tensors = {}
    for module, pair in pairs.items():
        stem = f"diffusion_model.{module}"
        tensors[f"{stem}.lora_A.weight"] = pair.down.bfloat16()
        tensors[f"{stem}.lora_B.weight"] = (pair.up.float() * pair.scale).bfloat16()
    save_safetensors(path, tensors, metadata)


def check_targets(
    lora: Mapping[str, LoraPair], weights: Mapping[str, Tensor], path: Path | str
) -> None:
    """Raise ValueError in one line unless the model has a weight of the shape of every pair."""
    missing = [module for module in lora if module + ".weight" not in weights]
    if missing:
        raise ValueError(
            f"{path} has {len(missing)} of {len(lora)} LoRA targets that the model lacks"
            f" ({', '.join(missing[:3])}): pass a LoRA made for this model"
        )
    for module, pair in lora.items():
        weight_shape = list(weights[module + ".weight"].shape)
        pair_shape = [pair.up.shape[0], pair.down.shape[1]]
        if weight_shape != pair_shape:
            raise ValueError(
                f"{path} has a LoRA of {pair_shape} for {module}, which is {weight_shape}:"
                " pass one made for this model"
            )


def looks_like_longlive(lora: Mapping[str, LoraPair], num_layers: int) -> bool:
    """Check for LongLive's form: rank 256 and scale 1 on all ten linear layers of every block."""
    in_blocks = all(module.startswith("blocks.") for module in lora)
    of_rank_256 = all((pair.rank, pair.scale) == (256, 1.0) for pair in lora.values())
    return in_blocks and of_rank_256 and len(lora) == LINEARS_OF_A_BLOCK * num_layers
