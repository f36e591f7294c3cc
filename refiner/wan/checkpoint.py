"""Published model files, identified and loaded without conversion.

info = inspect("self_forcing_dmd.pt")               # reads names and shapes only
model, info = load_transformer("longlive_base.pt", lora="lora.pt", dtype=torch.bfloat16)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..terminal import printable
from .identify import PUBLISHED_KEY, guess_preset, name_hint
from .layouts import INSTEAD, QUANTISED, Layout, choose_top_key, other_model, read_config, read_layout
from .lora import LoraFile, LoraPair, check_targets, looks_like_longlive, lora_modules, read_lora
from .transformer import WanConfig, WanTransformer
from .weight_file import WeightFile, choose_dtype, open_weights, save_safetensors

__all__ = [
    "CheckpointInfo",
    "describe",
    "inspect",
    "load_transformer",
    "load_vae_state",
    "read_transformer",
    "save_safetensors",
]

VAE_CHANNELS = 16


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a file is, as far as its names, shapes and metadata tell.

    `kind` is transformer, lora, refiner, vae, text encoder or unknown; `container` pt, safetensors or "N shards".
    `top_key` is the group used ("flat" when there is none). `tensors`, `nbytes` (as stored) and `dtypes` (by bytes,
    most first) are of that group. `config` is None unless a transformer's sizes could be read. `merged_lora` counts
    the weights a LoRA was merged into.
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


def inspect(path: Path | str, *, weights: str = "auto") -> CheckpointInfo:
    """Identifies a file without reading its tensors. `weights`: auto, ema (averaged) or raw, where a file has both.

    Raises ValueError in one line when it cannot be opened safely or holds no tensors.
    """
    return _survey(open_weights(path), weights)[0]


def load_transformer(
    path: Path | str,
    *,
    lora: Path | str | Sequence[LoraFile] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    weights: str = "auto",
) -> tuple[WanTransformer, CheckpointInfo]:
    """The network of a file, frozen and in eval mode, and what the file is.

    LoRAs are merged in fp32, one after the other; one of strength 0 changes nothing. `dtype` None keeps the stored one
    (of most bytes, where mixed; fp8 becomes bf16). On the CPU, unconverted weights stay mapped from the file. Raises
    ValueError in one line when the file is something else.
    """
    file = open_weights(path)
    info, layout = _survey(file, weights)
    tensors = _tensors(file, info, layout)
    config = _require_text_to_video(info, tensors)
    with torch.device("meta"):
        model = WanTransformer(config)
    expected = model.state_dict()
    _require_same(expected, tensors, info.path)
    dtype = choose_dtype(dtype, tensors, info.path)
    files = [LoraFile(Path(lora))] if isinstance(lora, (str, Path)) else [*(lora or ())]
    loras = [(read_lora(each.path), each.strength) for each in files]
    for each, (pairs, _) in zip(files, loras, strict=True):
        check_targets(pairs, expected, each.path)
    state = {}
    for name, stored in layout.names.items():
        module = name.removesuffix(".weight")
        mine = [(pairs[module], strength) for pairs, strength in loras if module in pairs and strength]
        state[name] = _placed(file.read(info.top_key, stored), mine, dtype, device)
    model.load_state_dict(state, assign=True)
    for pairs, _ in loras:
        info = _with_lora(info, pairs)
    return model.eval().requires_grad_(False), info


def read_transformer(path: Path | str, *, weights: str = "auto") -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Weights of a file as stored (quantised ones too), mapped, in Wan's names, for a host with modules of its own.

    Raises ValueError in one line when the file is something else or not complete.
    """
    file = open_weights(path)
    info, layout = _survey(file, weights)
    tensors = _tensors(file, info, layout)
    _require_kind(info, tensors)
    with torch.device("meta"):
        expected = WanTransformer(info.config).state_dict()
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(_incomplete(info.path, missing))
    return {name: file.read(info.top_key, stored) for name, stored in layout.names.items()}, info


def _placed(
    tensor: Tensor, loras: Sequence[tuple[LoraPair, float]], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    if not loras:
        return tensor.to(device=device, dtype=dtype)
    tensor = tensor.to(device)
    for pair, strength in loras:
        tensor = pair.merged(tensor, strength)
    return tensor.to(dtype)


def load_vae_state(path: Path | str) -> dict[str, Tensor]:
    """State dict of a Wan2.1 VAE file under its original names (`decoder.head.0.gamma`), on the CPU, as stored.

    Raises ValueError in one line when the file is something else.
    """
    file = open_weights(path)
    info, layout = _survey(file, "auto")
    if info.kind != "vae":
        raise ValueError(
            f"{path} is {INSTEAD[info.kind]}; the VAE is Wan2.1_VAE.pth or ComfyUI's wan_2.1_vae.safetensors"
        )
    if info.naming != "wan":
        raise ValueError(
            f"{path} is a VAE in diffusers' names: pass Wan2.1_VAE.pth or ComfyUI's wan_2.1_vae.safetensors"
        )
    tensors = _tensors(file, info, layout)
    channels = tensors["conv2.weight"].shape[:1] if "conv2.weight" in tensors else ()
    if not tensors["decoder.head.0.gamma"].ndim:
        raise ValueError(f"{path} is a VAE whose decoder.head.0.gamma is one number: it is damaged, download it again")
    if channels != (VAE_CHANNELS,):
        raise ValueError(
            f"{path} is a VAE of {sum(channels)} latent channels and not Wan2.1's {VAE_CHANNELS}: pass Wan2.1_VAE.pth"
        )
    return {name: file.read(info.top_key, stored) for name, stored in layout.names.items()}


def _tensors(file: WeightFile, info: CheckpointInfo, layout: Layout) -> dict[str, Tensor]:
    group = file.groups[info.top_key]
    return {name: group[stored] for name, stored in layout.names.items()}


def _survey(file: WeightFile, weights: str) -> tuple[CheckpointInfo, Layout]:
    hint, _ = name_hint(file.path)
    try:
        top_key = choose_top_key(file.groups, weights, PUBLISHED_KEY.get(hint or ""))
        layout = read_layout(file.groups[top_key])
    except ValueError as error:
        raise ValueError(f"{file.path} {error}") from error
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
    )
    if weights == "auto" and top_key != "generator_ema" and "generator_ema" in file.groups:
        info = _noted(info, f"{top_key} is what {hint} is published to use; weights=ema takes generator_ema")
    if layout.kind == "transformer":
        info = _with_config(info, layout, _tensors(file, info, layout))
    if layout.kind == "lora":
        info = _with_ranks(info, layout, group)
    return info, layout


def _with_config(info: CheckpointInfo, layout: Layout, tensors: dict[str, Tensor]) -> CheckpointInfo:
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
    if other := other_model(config, tensors):
        return replace(info, preset_reason=f"it looks like {other}, which none of the presets is")
    keys = (info.top_key, *info.other_keys)
    causal = stated.get("causal_ar") is True
    preset, reason = guess_preset(info.path, layout, config, keys, own_json.get("preset"), causal)
    return replace(info, preset=preset, preset_reason=reason)


def _with_ranks(info: CheckpointInfo, layout: Layout, group: dict[str, Tensor]) -> CheckpointInfo:
    try:
        modules = lora_modules(layout.names)
    except ValueError as error:
        return _noted(info, f"the file {error}")
    ranks = sorted({len(down) for parts in modules.values() if (down := group[parts["down"]]).ndim})
    info = _noted(info, f"rank {', '.join(map(str, ranks))} on {len(modules)} linear layers")
    try:
        scales = sorted({pair.scale for pair in read_lora(info.path).values()})
    except ValueError as error:
        return _noted(info, str(error).removeprefix(f"{info.path} "))
    return _noted(info, "scale " + " to ".join(f"{scale:g}" for scale in dict.fromkeys((scales[0], scales[-1]))))


def _with_lora(info: CheckpointInfo, pairs: dict[str, LoraPair]) -> CheckpointInfo:
    info = replace(info, merged_lora=info.merged_lora + len(pairs))
    if info.preset is None and looks_like_longlive(pairs, info.config.num_layers):
        reason = "the LoRA has rank 256 on every linear layer of the blocks, as LongLive's (and MemFlow's) has"
        info = replace(info, preset="longlive", preset_reason=reason)
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
    return (value, ()) if isinstance(value, dict) else ({}, (f"metadata {key!r} is not a JSON object: ignored",))


def _require_text_to_video(info: CheckpointInfo, tensors: dict[str, Tensor]) -> WanConfig:
    quantised = [name for name in tensors if QUANTISED.search(name)]
    if info.kind == "transformer" and quantised:
        raise ValueError(f"{info.path} has scaled, quantised weights ({quantised[0]}): pass the bf16 or fp16 file")
    return _require_kind(info, tensors)


def _require_kind(info: CheckpointInfo, tensors: dict[str, Tensor]) -> WanConfig:
    if info.kind != "transformer":
        raise ValueError(f"{info.path} is {INSTEAD[info.kind]}; a model file holds a Wan2.1 transformer")
    if info.config is None:
        raise ValueError(f"{info.path}: {info.notes[-1]}")
    if other := other_model(info.config, tensors):
        raise ValueError(f"{info.path} looks like {other}: pass a Wan2.1 text-to-video model of 16 channels")
    return info.config


def _require_same(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        raise ValueError(_incomplete(path, missing))
    if extra:
        raise ValueError(f"{path} has {len(extra)} tensors that Wan2.1 has not ({_few(extra)}): it is another model")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            shape, right = list(found[name].shape), list(tensor.shape)
            raise ValueError(
                f"{path} has a {name} of {shape}, which should be {right}: the file is damaged or another model"
            )


def _incomplete(path: Path, missing: list[str]) -> str:
    return f"{path} lacks {len(missing)} tensors ({_few(missing)}): the file is not complete, download it again"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def describe(info: CheckpointInfo) -> str:
    """The lines of `autorefiner inspect`: a word and what there is to say, aligned."""
    rows = [("file", f"{info.path} ({info.container})"), ("kind", f"{info.kind}, {info.naming} names")]
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
