"""LoRA files of a Wan2.1 transformer: read, checked against the model, and merged into its
weights."""

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
    """down [rank, in], up [out, rank] as stored; the weight's change is scale · up · down."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The weight [out, in] with this LoRA added, in fp32, on the weight's device."""
        up, down = (part.to(weight.device).float() for part in (self.up, self.down))
        return weight.float() + strength * self.scale * (up @ down)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA's file or folder, and how strongly it is merged."""

    path: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not -100 <= self.strength <= 100:
            raise ValueError(
                f"strength {self.strength} of {self.path}: give a number from -100 to 100, like 0.8"
            )

    @classmethod
    def parse(cls, text: str) -> "LoraFile":
        """From FILE or FILE:STRENGTH. A file whose whole name ends like that is a file."""
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
        """Its name, and its strength where it is not 1."""
        return self.path.name if self.strength == 1 else f"{self.path.name}:{self.strength:g}"


def read_lora(path: Path | str) -> dict[str, LoraPair]:
    """{module: pair} of a LoRA file or PEFT folder, in any of the names that lora_names.py knows.

    The scale is alpha / rank where the file has alpha, else what its metadata or the
    adapter_config.json beside it states, else 1. Data stays mapped. Raises ValueError in one line.
    """
    file = open_weights(path)
    try:
        group = choose_top_key(file.groups, "auto", "generator_lora")
        layout = read_layout(file.groups[group])
        if layout.kind == "refiner":
            raise ValueError("is a refiner and not a LoRA: pass it with --refiner")
        if layout.kind != "lora":
            raise ValueError(
                f"is not a LoRA but a file of kind {layout.kind!r}: pass LongLive's lora.pt or the like"
            )
        stated = stated_scale(Path(path), file.metadata) or StatedScale()
        pairs = read_pairs(file, group, layout.names, stated)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return pairs


def read_pairs(
    file: WeightFile, group: str, names: Mapping[str, str], stated: StatedScale
) -> dict[str, LoraPair]:
    """{module: pair} of the LoRA tensors in a group, by bare name; ValueError (without the file's
    name) for others."""
    pairs = {}
    for module, stored in lora_modules(names).items():
        down, up = file.read(group, stored.parts["down"]), file.read(group, stored.parts["up"])
        if down.ndim != 2 or up.ndim != 2 or not len(down) or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"has parts of {list(up.shape)} and {list(down.shape)} for {module}: they do not multiply"
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


def save_lora(path: Path | str, pairs: Mapping[str, LoraPair], told: Mapping[str, str]) -> None:
    """Write a LoRA that ComfyUI's own loaders read (`diffusion_model.<module>.lora_A.weight`),
    scale folded into B."""
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"diffusion_model.{module}.lora_A.weight"] = pair.down.bfloat16()
        tensors[f"diffusion_model.{module}.lora_B.weight"] = (
            pair.up.float() * pair.scale
        ).bfloat16()
    save_safetensors(path, tensors, told)


def check_targets(
    lora: Mapping[str, LoraPair], weights: Mapping[str, Tensor], path: Path | str
) -> None:
    """Raises ValueError in one line unless every pair has a weight of its shape in the model."""
    lost = [module for module in lora if module + ".weight" not in weights]
    if lost:
        raise ValueError(
            f"{path} has {len(lost)} of {len(lora)} LoRA targets that the model lacks ({', '.join(lost[:3])}): "
            "pass a LoRA made for this model"
        )
    for module, pair in lora.items():
        shape, made = (
            list(weights[module + ".weight"].shape),
            [pair.up.shape[0], pair.down.shape[1]],
        )
        if shape != made:
            raise ValueError(
                f"{path} has a LoRA of {made} for {module}, which is {shape}: pass one made for this model"
            )


def looks_like_longlive(lora: Mapping[str, LoraPair], num_layers: int) -> bool:
    """Whether the LoRA is of LongLive's form: rank 256 on each of the ten linear layers of every
    block, scale 1."""
    in_blocks = all(module.startswith("blocks.") for module in lora)
    right = all((pair.rank, pair.scale) == (256, 1.0) for pair in lora.values())
    return in_blocks and right and len(lora) == LINEARS_OF_A_BLOCK * num_layers
