"""Transformer weights read from a file: scaled fp8 is multiplied out, an embedded LoRA merged."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fp8 import FORMAT, SCALES, check_formats, scale_names, unscaled
from .layouts import QUANTISED, Layout
from .lora import LoraPair, check_targets, read_pairs
from .lora_scale import StatedScale, stated_scale
from .weight_file import WeightFile

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MARK = "scaled_fp8"  # tensor that announces scales in ComfyUI's older files
HEADER = "_quantization_metadata"  # metadata that may announce them in its newer files


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Weights by Wan's names.

    `scales` maps stored names of weights to those of their scales; `pairs` is the LoRA of a
    PEFT-wrapped model.
    """

    file: WeightFile
    group: str
    names: dict[str, str]
    scales: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, LoraPair] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, Tensor]:
        """Tensors by Wan's names, with shape and dtype but perhaps no data."""
        group = self.file.groups[self.group]
        return {name: group[stored] for name, stored in self.names.items()}

    def read(self, name: str) -> Tensor:
        """Read a weight as stored, or in fp32 where it is scaled or has a LoRA."""
        stored = self.names[name]
        tensor = self.file.read(self.group, stored)
        if stored in self.scales:
            scale = self.file.read(self.group, self.scales[stored])
            try:
                tensor = unscaled(tensor, scale, stored)
            except ValueError as error:
                raise ValueError(f"{self.file.path} {error}") from error
        pair = self.pairs.get(name.removesuffix(".weight"))
        return tensor if pair is None else pair.merged(tensor)


def stored_weights(file: WeightFile, group: str, layout: Layout) -> StoredWeights:
    """Find a transformer's weights, scales and embedded LoRA in a file.

    Raises ValueError in one line for quantised weights in an unsupported format.
    """
    try:
        scales = _scales(file, group)
        names = {
            name: stored for name, stored in layout.names.items() if not QUANTISED.search(name)
        }
        weights = StoredWeights(file, group, names, scales, embedded_lora(file, group, layout))
    except ValueError as error:
        raise ValueError(f"{file.path} {error}") from error
    check_targets(weights.pairs, weights.headers, file.path)
    return weights


def embedded_lora(file: WeightFile, group: str, layout: Layout) -> dict[str, LoraPair]:
    """Read the LoRA in a PEFT-wrapped model, by module; its scale is 1 where none is stated."""
    if not layout.adapter:
        return {}
    stated = stated_scale(file.path, file.metadata) or StatedScale()
    return read_pairs(file, group, layout.adapter, stated)


def _scales(file: WeightFile, group: str) -> dict[str, str]:
    stored = file.groups[group]
    scales = scale_names(stored)
    for weight, scale in scales.items():
        if stored[weight].dtype not in FP8:
            raise ValueError(
                f"has {scale} for a weight in {stored[weight].dtype}, so it is quantised:"
                " pass the bf16, fp16 or scaled fp8 file"
            )
    mark = next((name for name in stored if name.split(".")[-1] == MARK), None)
    if mark and not scales:
        raise ValueError(
            f"has {mark} but no scales of quantised weights: pass the bf16 or fp16 file"
        )
    check_formats(stored, lambda name: file.read(group, name))
    return scales


def as_comfyui_reads(file: WeightFile, group: str) -> bool:
    """Check that ComfyUI would apply every scale: one number each, announced by mark or format."""
    if HEADER in file.metadata:
        return True
    stored = file.groups[group]
    scales = [name for name in stored if name.rpartition(".")[2] in SCALES]
    marked = any(name.split(".")[-1] == MARK for name in stored)
    return all(_announced(name, stored, marked) for name in scales)


def _announced(scale: str, stored: Mapping[str, Tensor], marked: bool) -> bool:
    layer, _, kind = scale.rpartition(".")
    weight = stored.get(f"{layer}.weight")
    if f"{layer}.{FORMAT}" in stored and weight is not None:
        return stored[scale].shape not in ((len(weight),), (len(weight), 1))
    return marked and kind == "scale_weight" and stored[scale].numel() == 1
