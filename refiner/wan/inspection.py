"""Identify a model file: kind, layout, sizes and preset, from names, shapes and metadata."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from .groups import EMA_ROLES, role_of
from .identify import Evidence, Guess, guess_preset, guess_with_lora
from .layouts import INSTEAD, Layout, choose_top_key, other_model, read_config, read_layout
from .lora import LoraFile, LoraPair, looks_like_longlive, read_lora
from .lora_names import lora_modules
from .published import published_as
from .shards import class_beside, is_expert
from .transformer import WanConfig
from .weight_file import WeightFile

LORA_GROUP = "generator_lora"


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """Description of a model file, from its names, shapes and metadata.

    `kind` is transformer, lora, refiner, vae, text encoder or unknown; `container` pt, safetensors
    or "N shards". `top_key` is the group in use ("flat" when there is none); `tensors`, `nbytes`
    (as stored) and `dtypes` (most bytes first) describe that group. `config` is None unless a
    transformer's sizes could be read. `preset` is None unless proven; then `likely` lists
    candidates. `preset_reason` explains either. `refused` is a name prefix that is not one of those
    removed. `merged_lora` counts the weights that a LoRA was merged into. `other` is another model
    that a transformer looks like.
    """

    path: Path
    kind: str
    container: str
    top_key: str
    other_keys: tuple[str, ...]
    naming: str
    prefix: str
    infixes: tuple[str, ...]
    config: WanConfig | None
    dtypes: tuple[str, ...]
    tensors: int
    nbytes: int
    metadata: dict[str, str]
    preset: str | None
    preset_reason: str
    notes: tuple[str, ...]
    merged_lora: int = 0
    likely: tuple[str, ...] = ()
    refused: str = ""
    other: str = ""


def headers_by_name(file: WeightFile, info: CheckpointInfo, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of the group in use, by bare name; they may have no data."""
    group = file.groups[info.top_key]
    return {name: group[stored] for name, stored in layout.names.items()}


def _choose_group(file: WeightFile, weights: str) -> tuple[str, Layout]:
    """Choose the group to use, and read its layout. Of a LoRA and its average, take the LoRA."""
    row = published_as(file.path)
    try:
        top_key = choose_top_key(file.groups, weights, row.key if row else None)
        layout = read_layout(file.groups[top_key])
        if layout.kind == "lora" and weights == "auto":
            top_key = choose_top_key(file.groups, weights, LORA_GROUP)
            layout = read_layout(file.groups[top_key])
    except ValueError as error:
        raise ValueError(f"{file.path} {error}") from error
    return top_key, layout


def inspect_weights(file: WeightFile, weights: str) -> tuple[CheckpointInfo, Layout]:
    """Identify the group of an open file that `weights` (auto, ema or raw) selects."""
    top_key, layout = _choose_group(file, weights)
    group = file.groups[top_key]
    nbytes: dict[str, int] = {}
    for tensor in group.values():
        name = str(tensor.dtype).removeprefix("torch.")
        nbytes[name] = nbytes.get(name, 0) + tensor.numel() * tensor.element_size()
    info = CheckpointInfo(
        path=file.path,
        kind=layout.kind,
        container=file.container,
        top_key=top_key,
        other_keys=tuple(key for key in (*file.groups, *file.others) if key != top_key),
        naming=layout.naming,
        prefix=layout.prefix,
        infixes=layout.infixes,
        config=None,
        dtypes=tuple(sorted(nbytes, key=lambda name: -nbytes[name])),
        tensors=len(group),
        nbytes=sum(nbytes.values()),
        metadata=file.metadata,
        preset=None,
        preset_reason=f"a {layout.kind} file has none",
        notes=(),
        refused=layout.refused,
    )
    if layout.refused:
        info = _noted(
            info, f"its names begin with {layout.refused[:80]!r}, which is no known prefix"
        )
    if layout.kind == "transformer":
        info = _noted(info, *_choices(file, weights, top_key, layout))
        info = _with_config(info, layout, headers_by_name(file, info, layout))
    if layout.kind == "lora":
        info = _with_ranks(info, layout, group)
    return info, layout


def _choices(file: WeightFile, weights: str, top_key: str, layout: Layout) -> Iterator[str]:
    """Yield notes on what was chosen for the user."""
    averaged = next((group for group in file.groups if role_of(group) in EMA_ROLES), top_key)
    if weights == "auto" and averaged != top_key and published_as(file.path):
        yield f"{top_key} is what its authors sample; weights=ema takes {averaged}"
    if layout.adapter:
        yield (
            "it contains an unmerged PEFT LoRA, merged on load by its stated scale,"
            " or by 1 where none is stated"
        )


def _with_config(
    info: CheckpointInfo, layout: Layout, tensors: dict[str, Tensor]
) -> CheckpointInfo:
    config_json, notes = _json_of(info.metadata, "config")
    pack_json, more = _json_of(info.metadata, "autorefiner")
    info = _noted(info, *notes, *more)
    stated = config_json.get("transformer")
    stated = stated if isinstance(stated, dict) else {}
    try:
        config = read_config(tensors, stated)
    except ValueError as error:
        return replace(_noted(info, f"the file {error}"), preset_reason="its sizes cannot be read")
    info = replace(info, config=config)
    if other := _other_model(info, tensors):
        return replace(
            info, other=other, preset_reason=f"it looks like {other}, which none of the presets is"
        )
    causal = stated.get("causal_ar") is True or class_beside(info.path).startswith("Causal")
    groups = (info.top_key, *info.other_keys)
    evidence = Evidence(info.path, layout, config, groups, pack_json.get("preset"), causal)
    return _with_guess(info, guess_preset(evidence))


def _other_model(info: CheckpointInfo, names: Collection[str]) -> str | None:
    """Name the model when it is not a whole Wan2.1 text-to-video one; None when it is."""
    if other := other_model(info.config, names):
        return other
    return "one of the two experts of Wan2.2 A14B, half a model" if is_expert(info.path) else None


def _with_guess(info: CheckpointInfo, guess: Guess) -> CheckpointInfo:
    return replace(info, preset=guess.preset, preset_reason=guess.reason, likely=guess.likely)


def _with_ranks(info: CheckpointInfo, layout: Layout, group: dict[str, Tensor]) -> CheckpointInfo:
    try:
        modules = lora_modules(layout.names)
    except ValueError as error:
        return _noted(info, f"the file {error}")
    downs = [group[module.parts["down"]] for module in modules.values()]
    ranks = sorted({len(down) for down in downs if down.ndim})
    info = _noted(info, f"rank {', '.join(map(str, ranks))} on {len(modules)} linear layers")
    try:
        scales = sorted({pair.scale for pair in read_lora(info.path).values()})
    except ValueError as error:
        return _noted(info, str(error).removeprefix(f"{info.path} "))
    ends = dict.fromkeys((scales[0], scales[-1]))
    return _noted(info, "scale " + " to ".join(f"{scale:g}" for scale in ends))


def add_loras(
    info: CheckpointInfo, files: Sequence[LoraFile], loras: Sequence[dict[str, LoraPair]]
) -> CheckpointInfo:
    """Update the preset for the LoRAs that will be merged."""
    for file, pairs in zip(files, loras, strict=True):
        if info.config is not None and file.strength:
            like_longlive = looks_like_longlive(pairs, info.config.num_layers)
            before = Guess(info.preset, info.preset_reason, info.likely)
            info = _with_guess(info, guess_with_lora(file.path, like_longlive, before))
    return info


def _noted(info: CheckpointInfo, *notes: str) -> CheckpointInfo:
    return replace(info, notes=info.notes + notes)


def _json_of(metadata: dict[str, str], key: str) -> tuple[dict, tuple[str, ...]]:
    """Parse a metadata value as a JSON object; return an empty one and a note when it is not."""
    if key not in metadata:
        return {}, ()
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value, ()
    return {}, (f"metadata {key!r} is not a JSON object: ignored",)


def require_transformer(info: CheckpointInfo) -> WanConfig:
    """Return the sizes of a whole Wan2.1 text-to-video model; ValueError for anything else."""
    if info.refused:
        raise ValueError(
            f"{info.path} has names that begin with {info.refused[:80]!r}, which is no known"
            " prefix: save the generator's state dict alone"
        )
    if info.kind != "transformer":
        raise ValueError(
            f"{info.path} is {INSTEAD[info.kind]}; a model file holds a Wan2.1 transformer"
        )
    if info.config is None:
        raise ValueError(f"{info.path}: {info.notes[-1]}")
    if info.other:
        raise ValueError(
            f"{info.path} looks like {info.other}: pass a Wan2.1 text-to-video model of 16 channels"
        )
    return info.config
