"""Published model files, identified and loaded without conversion.

info = inspect("self_forcing_dmd.pt")               # reads names and shapes only
model, info = load_transformer("longlive_base.pt", lora="lora.pt", dtype=torch.bfloat16)
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..terminal import printable
from .groups import EMA_ROLES, role_of
from .identify import Evidence, Guess, guess_preset, guess_with_lora
from .layouts import INSTEAD, Layout, choose_top_key, other_model, read_config, read_layout
from .lora import LoraFile, LoraPair, check_targets, looks_like_longlive, read_lora
from .lora_names import lora_modules
from .published import published_as
from .shards import class_beside, is_expert
from .stored import StoredWeights, as_comfyui_reads, stored_weights
from .transformer import WanConfig, WanTransformer
from .vae import CHANNELS
from .weight_file import WeightFile, choose_dtype, open_weights, save_safetensors

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "describe",
    "inspect",
    "load_transformer",
    "load_vae_state",
    "open_checkpoint",
    "read_transformer",
    "require_transformer",
    "save_safetensors",
]

LORA_GROUP = "generator_lora"


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a file is, as far as its names, shapes and metadata tell.

    `kind` is transformer, lora, refiner, vae, text encoder or unknown; `container` pt, safetensors
    or "N shards". `top_key` is the group used ("flat" when there is none). `tensors`, `nbytes` (as
    stored) and `dtypes` (by bytes, most first) are of that group. `config` is None unless a
    transformer's sizes could be read. `preset` is None unless it is proven; `likely` are the ones
    to ask for then, and `preset_reason` says why. `refused` is a prefix of its names that is not
    removed. `merged_lora` counts the weights a LoRA was merged into.
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
    other: str = ""  # another model that a transformer looks like


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open model file: what it is, and what it loads. A run opens each of its files once."""

    info: CheckpointInfo
    file: WeightFile
    layout: Layout
    loras: tuple[tuple[LoraFile, Mapping[str, LoraPair]], ...] = ()

    def transformer(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> tuple[WanTransformer, CheckpointInfo]:
        """Load the network, frozen and in eval mode, and say what was merged into it.

        LoRAs are merged in fp32, one after the other; one of strength 0 changes nothing. `dtype`
        None keeps the stored one (of most bytes, where mixed; fp8 becomes bf16). On the CPU,
        unconverted weights stay mapped from the file. Raises ValueError in one line when the file
        is something else.
        """
        config, path = require_transformer(self.info), self.info.path
        stored = stored_weights(self.file, self.info.top_key, self.layout)
        with torch.device("meta"):
            model = WanTransformer(config)
        expected = model.state_dict()
        _require_same(expected, stored.headers, path)
        dtype = choose_dtype(dtype, stored.headers, path)
        for lora, pairs in self.loras:
            check_targets(pairs, expected, lora.path)
        state = {}
        for name in stored.names:
            changes = list(self._changes(name.removesuffix(".weight")))
            state[name] = _placed(stored.read(name), changes, dtype, device)
        model.load_state_dict(state, assign=True)
        merged = sum(len(pairs) for _, pairs in self.loras) + len(stored.pairs)
        return model.eval().requires_grad_(False), replace(self.info, merged_lora=merged)

    def _changes(self, module: str) -> Iterator[tuple[LoraPair, float]]:
        for lora, pairs in self.loras:
            if module in pairs and lora.strength:
                yield pairs[module], lora.strength

    def stored_transformer(self) -> dict[str, Tensor]:
        """Weights as stored, mapped, in Wan's names, for a host with modules of its own.

        Quantised ones too, where ComfyUI reads them; other scaled fp8 becomes bf16. Raises
        ValueError in one line when the file is something else or not complete.
        """
        config, info = require_transformer(self.info), self.info
        with torch.device("meta"):
            expected = WanTransformer(config).state_dict()
        missing = [name for name in expected if name not in self.layout.names]
        if missing:
            raise ValueError(_incomplete(info.path, missing))
        if self.layout.adapter or not as_comfyui_reads(self.file, info.top_key):
            stored = stored_weights(self.file, info.top_key, self.layout)
            dtype = choose_dtype(None, stored.headers, info.path)
            return {name: _as_one_dtype(stored, name, dtype) for name in stored.names}
        return {
            name: self.file.read(info.top_key, stored) for name, stored in self.layout.names.items()
        }

    def vae_width(self) -> int:
        """Base width of a Wan2.1 VAE; ValueError when the file is something else."""
        return len(self._vae_headers()["decoder.head.0.gamma"])

    def vae_state(self) -> dict[str, Tensor]:
        """State dict of a Wan2.1 VAE under its original names, on the CPU, as stored; ValueError as
        `vae_width`."""
        self._vae_headers()
        return {
            name: self.file.read(self.info.top_key, stored)
            for name, stored in self.layout.names.items()
        }

    def _vae_headers(self) -> dict[str, Tensor]:
        path, wanted = self.info.path, "Wan2.1_VAE.pth or ComfyUI's wan_2.1_vae.safetensors"
        if self.info.kind != "vae":
            raise ValueError(f"{path} is {INSTEAD[self.info.kind]}; the VAE is {wanted}")
        if self.info.naming != "wan":
            raise ValueError(f"{path} is a VAE in diffusers' names: pass {wanted}")
        headers = _tensors(self.file, self.info, self.layout)
        channels = headers["conv2.weight"].shape[:1] if "conv2.weight" in headers else ()
        if not headers["decoder.head.0.gamma"].ndim:
            raise ValueError(
                f"{path} is a VAE whose decoder.head.0.gamma is one number: it is damaged, download it again"
            )
        if channels != (CHANNELS,):
            raise ValueError(
                f"{path} is a VAE of {sum(channels)} latent channels and not Wan2.1's {CHANNELS}: pass"
                " Wan2.1_VAE.pth"
            )
        return headers


def open_checkpoint(
    path: Path | str, *, weights: str = "auto", lora: Sequence[LoraFile] = ()
) -> Checkpoint:
    """Open and identify a file without reading its tensors.

    `weights` is auto, ema (averaged) or raw, where a file has both. LoRAs are read; here they
    decide the preset alone. Raises ValueError in one line when a file cannot be opened safely or
    holds no tensors.
    """
    file = open_weights(path)
    info, layout = _survey(file, weights)
    pairs = [read_lora(each.path) for each in lora]
    return Checkpoint(
        _with_loras(info, lora, pairs), file, layout, tuple(zip(lora, pairs, strict=True))
    )


def inspect(
    path: Path | str, *, weights: str = "auto", lora: Sequence[LoraFile] = ()
) -> CheckpointInfo:
    """Identify a file, as `open_checkpoint`."""
    return open_checkpoint(path, weights=weights, lora=lora).info


def load_transformer(
    path: Path | str,
    *,
    lora: Path | str | Sequence[LoraFile] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    weights: str = "auto",
) -> tuple[WanTransformer, CheckpointInfo]:
    """Load the network of a file, as `Checkpoint.transformer`."""
    files = [LoraFile(Path(lora))] if isinstance(lora, (str, Path)) else [*(lora or ())]
    return open_checkpoint(path, weights=weights, lora=files).transformer(
        dtype=dtype, device=device
    )


def read_transformer(
    path: Path | str, *, weights: str = "auto"
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Read the weights of a file, as `Checkpoint.stored_transformer`."""
    checkpoint = open_checkpoint(path, weights=weights)
    return checkpoint.stored_transformer(), checkpoint.info


def load_vae_state(path: Path | str) -> dict[str, Tensor]:
    """Read a VAE file, as `Checkpoint.vae_state`."""
    return open_checkpoint(path).vae_state()


def _as_one_dtype(stored: StoredWeights, name: str, dtype: torch.dtype) -> Tensor:
    """A weight as stored, or in the file's main dtype where it had to be computed."""
    tensor = stored.read(name)
    return tensor if tensor.dtype == stored.headers[name].dtype else tensor.to(dtype)


def _placed(
    tensor: Tensor,
    loras: Sequence[tuple[LoraPair, float]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    if not loras:
        return tensor.to(device=device, dtype=dtype)
    tensor = tensor.to(device)
    for pair, strength in loras:
        tensor = pair.merged(tensor, strength)
    return tensor.to(dtype)


def _tensors(file: WeightFile, info: CheckpointInfo, layout: Layout) -> dict[str, Tensor]:
    group = file.groups[info.top_key]
    return {name: group[stored] for name, stored in layout.names.items()}


def _choose_group(file: WeightFile, weights: str) -> tuple[str, Layout]:
    """The group to use and its layout. Where a file holds a LoRA and its average, the LoRA."""
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


def _survey(file: WeightFile, weights: str) -> tuple[CheckpointInfo, Layout]:
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
            info,
            f"its names begin with {layout.refused[:80]!r}, which is no prefix that is removed",
        )
    if layout.kind == "transformer":
        info = _noted(info, *_choices(file, weights, top_key, layout))
        info = _with_config(info, layout, _tensors(file, info, layout))
    if layout.kind == "lora":
        info = _with_ranks(info, layout, group)
    return info, layout


def _choices(file: WeightFile, weights: str, top_key: str, layout: Layout) -> Iterator[str]:
    """Notes of what was chosen for the user."""
    averaged = next((group for group in file.groups if role_of(group) in EMA_ROLES), top_key)
    if weights == "auto" and averaged != top_key and published_as(file.path):
        yield f"{top_key} is what its authors sample; weights=ema takes {averaged}"
    if layout.adapter:
        yield "PEFT's LoRA lies in it unmerged: it is merged on load, by the scale that is stated, else 1"


def _with_config(
    info: CheckpointInfo, layout: Layout, tensors: dict[str, Tensor]
) -> CheckpointInfo:
    config_json, notes = _json_of(info.metadata, "config")
    own_json, more = _json_of(info.metadata, "autorefiner")
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
    return _with_guess(
        info,
        guess_preset(Evidence(info.path, layout, config, groups, own_json.get("preset"), causal)),
    )


def _other_model(info: CheckpointInfo, names: Collection[str]) -> str | None:
    """Name the model that a transformer is instead of a whole Wan2.1 text-to-video one; None when
    it is that."""
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
    ranks = sorted(
        {len(down) for pair in modules.values() if (down := group[pair.parts["down"]]).ndim}
    )
    info = _noted(info, f"rank {', '.join(map(str, ranks))} on {len(modules)} linear layers")
    try:
        scales = sorted({pair.scale for pair in read_lora(info.path).values()})
    except ValueError as error:
        return _noted(info, str(error).removeprefix(f"{info.path} "))
    return _noted(
        info,
        "scale " + " to ".join(f"{scale:g}" for scale in dict.fromkeys((scales[0], scales[-1]))),
    )


def _with_loras(
    info: CheckpointInfo, files: Sequence[LoraFile], loras: Sequence[dict[str, LoraPair]]
) -> CheckpointInfo:
    for file, pairs in zip(files, loras, strict=True):
        if info.config is not None and file.strength:
            like_longlive = looks_like_longlive(pairs, info.config.num_layers)
            before = Guess(info.preset, info.preset_reason, info.likely)
            info = _with_guess(info, guess_with_lora(file.path, like_longlive, before))
    return info


def _noted(info: CheckpointInfo, *notes: str) -> CheckpointInfo:
    return replace(info, notes=info.notes + notes)


def _json_of(metadata: dict[str, str], key: str) -> tuple[dict, tuple[str, ...]]:
    """The JSON object of a metadata value; when it is none, an empty one and a note."""
    if key not in metadata:
        return {}, ()
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError):
        value = None
    return (
        (value, ())
        if isinstance(value, dict)
        else ({}, (f"metadata {key!r} is not a JSON object: ignored",))
    )


def require_transformer(info: CheckpointInfo) -> WanConfig:
    """The sizes of a whole Wan2.1 text-to-video model; ValueError in one line for anything else."""
    if info.refused:
        raise ValueError(
            f"{info.path} has names that begin with {info.refused[:80]!r}, which is no prefix that is removed: save the"
            " generator's state dict alone"
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


def _require_same(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        raise ValueError(_incomplete(path, missing))
    if scales := [name for name in extra if "scale" in name or "quant" in name]:
        raise ValueError(
            f"{path} has quantised weights in another format ({_few(scales)}): pass the bf16 or fp16 file"
        )
    if extra:
        raise ValueError(
            f"{path} has {len(extra)} tensors that Wan2.1 has not ({_few(extra)}): it is another model"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            shape, right = list(found[name].shape), list(tensor.shape)
            raise ValueError(
                f"{path} has a {name} of {shape}, which should be {right}: the file is damaged or another model"
            )


def _incomplete(path: Path, missing: list[str]) -> str:
    return f"{path} lacks {len(missing)} tensors ({_few(missing)}): the file is not complete, download it again"


def _few(names: list[str]) -> str:
    return ", ".join(name[:80] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def describe(info: CheckpointInfo) -> str:
    """The lines of `autorefiner inspect`: a word and what there is to say, aligned."""
    rows = [
        ("file", f"{info.path} ({info.container})"),
        ("kind", f"{info.kind}, {info.naming} names"),
    ]
    also = f" (also in it: {', '.join(info.other_keys)})" if info.other_keys else ""
    rows.append(("weights", info.top_key + also))
    removed = " ".join(part for part in (info.prefix, *info.infixes) if part)
    rows.append(("removed", removed or "nothing"))
    if info.config:
        rows.append(("sizes", _sizes(info.config)))
    rows.append(("tensors", f"{info.tensors}, {' and '.join(info.dtypes)}, {_bytes(info.nbytes)}"))
    rows.append(("preset", f"{info.preset or 'none'}: {info.preset_reason}"))
    most = 400 if info.kind == "refiner" else 80  # a refiner's card is what there is to know of it
    rows += [("metadata", f"{key} = {_short(value, most)}") for key, value in info.metadata.items()]
    rows += [("note", note) for note in info.notes]
    if info.merged_lora:
        rows.append(("LoRA", f"merged into {info.merged_lora} weights"))
    return "\n".join(f"{word:<10}{printable(text)}" for word, text in rows)


def _sizes(config: WanConfig) -> str:
    return (
        f"width {config.dim}, {config.num_layers} layers, {config.num_heads} heads, feed-forward {config.ffn_dim}, "
        f"{config.in_dim} channels, text {config.text_len} x {config.text_dim}"
    )


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _short(value: str, most: int) -> str:
    line = " ".join(value.split())
    return line if len(line) <= most else line[: most - 3] + "..."
