"""Layouts of published files: kinds, wrappers' prefixes, diffusers' names, and sizes."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .groups import EMA_ROLES, OTHER_ROLES, RAW_ROLES, REMOVED, role_of
from .transformer import HEAD_DIM, WanConfig

VAE_WRAPPERS = REMOVED | {"first_stage_model", "vae"}
TEXT_WRAPPERS = REMOVED | {"text_encoder", "text_encoders", "cond_stage_model", "umt5xxl"}
ADAPTED = "base_layer."  # PEFT's infix of the weights of a layer with a LoRA
INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", ADAPTED)
# Kind, naming, prefixes to remove, and a tensor that only this kind of model has.
ANCHORS = (
    ("transformer", "wan", REMOVED, "blocks.0.self_attn.q.weight"),
    ("transformer", "diffusers", REMOVED, "blocks.0.attn1.to_q.weight"),
    ("vae", "wan", VAE_WRAPPERS, "decoder.head.0.gamma"),
    ("vae", "diffusers", VAE_WRAPPERS, "decoder.conv_in.weight"),
    ("text encoder", "hf", TEXT_WRAPPERS, "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ("text encoder", "wan", TEXT_WRAPPERS, "blocks.0.pos_embedding.embedding.weight"),
)
REFINER_PREFIX = "autorefiner."
LORA_INFIXES = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.")
QUANTISED = re.compile(
    r"(^scaled_fp8|\.(scale_weight|scale_input|weight_scale|input_scale|comfy_quant))$"
)
# Ends of the message for a file of this kind where another was expected.
INSTEAD = {
    "lora": "a LoRA: pass it as the LoRA beside its base model",
    "refiner": "a refiner: pass it as the refiner beside its base model",
    "vae": "a VAE: pass it as the VAE",
    "text encoder": "a text encoder: pass it as the text encoder",
    "transformer": "a video transformer: pass it as the model",
    "unknown": "no file of a known kind",
}

DIFFUSERS_TOP = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
DIFFUSERS_BLOCK = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    # diffusers numbers the norms in the order they run; Wan calls the only affine one norm3
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
DIFFUSERS_PROJECTIONS = {".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", ".to_out.0.": ".o."}


@dataclass(frozen=True, slots=True)
class Layout:
    """Naming of a group of tensors.

    `names` maps bare names (Wan's, for a transformer) to stored ones; `adapter` does the same for
    the LoRA inside a PEFT-wrapped transformer. `refused` is a prefix, before the names of a known
    kind of model, that is not one of those removed.
    """

    kind: str
    naming: str
    prefix: str
    infixes: tuple[str, ...]
    names: dict[str, str]
    adapter: dict[str, str] = field(default_factory=dict)
    refused: str = ""


def read_layout(stored: Collection[str]) -> Layout:
    """Recognise a group of tensors by its names; the kind is "unknown" when nothing fits."""
    infixes = tuple(infix for infix in INFIXES if any(infix in name for name in stored))
    clean = {_without(name, infixes): name for name in stored}
    if len(clean) < len(stored):
        raise ValueError(
            f"two tensors have the same name once {', '.join(infixes)} is removed:"
            " the file is damaged"
        )
    adapter = {name: full for name, full in clean.items() if _is_lora(name)}
    weights = {name: full for name, full in clean.items() if name not in adapter}
    if adapter and ADAPTED not in infixes:
        kind = "refiner" if any(name.startswith(REFINER_PREFIX) for name in clean) else "lora"
        return Layout(kind, "lora", "", infixes, clean)
    refused = ""
    for kind, naming, wrappers, anchor in ANCHORS:
        prefixes = [
            name.removesuffix(anchor)
            for name in weights
            if name == anchor or name.endswith("." + anchor)
        ]
        removable = [prefix for prefix in prefixes if _all_in(prefix, wrappers)]
        if not removable:
            refused = refused or next(iter(prefixes), "")
            continue
        prefix = max(removable, key=len)
        rename = wan_name if (kind, naming) == ("transformer", "diffusers") else str
        names = {rename(name.removeprefix(prefix)): full for name, full in weights.items()}
        if len(names) < len(weights):
            raise ValueError(
                f"two tensors have the same name once {prefix!r} is removed: the file is damaged"
            )
        return Layout(kind, naming, prefix, infixes, names, adapter)
    return Layout("unknown", "unknown", "", infixes, clean, refused=refused)


def _is_lora(name: str) -> bool:
    return any(infix in name for infix in LORA_INFIXES)


def _all_in(prefix: str, wrappers: Collection[str]) -> bool:
    return all(key in wrappers for key in prefix.split(".")[:-1])


def _without(name: str, infixes: tuple[str, ...]) -> str:
    for infix in infixes:
        name = name.replace(infix, "")
    return name


def wan_name(name: str) -> str:
    """Translate a name of diffusers' WanTransformer3DModel to Wan's; return others unchanged."""
    block = re.match(r"(blocks\.\d+\.)(.+)", name)
    start, rest = block.groups() if block else ("", name)
    for theirs, ours in (DIFFUSERS_BLOCK if block else DIFFUSERS_TOP).items():
        if rest == theirs or rest.startswith(theirs + "."):
            rest = ours + rest.removeprefix(theirs)
            break
    if block:
        for theirs, ours in DIFFUSERS_PROJECTIONS.items():
            rest = rest.replace(theirs, ours)
    return start + rest


def choose_top_key(
    groups: Mapping[str, Collection[str]], weights: str, preferred: str | None
) -> str:
    """Choose the group of a file to use. `weights` is "auto", "ema" (averaged) or "raw".

    "auto" tries the role `preferred`, then averaged weights, then raw ones, then the only group
    that may be a generator. Raises ValueError (without the file's name) when nothing fits.
    """
    if weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights {weights!r}: use auto, ema or raw")
    auto = (preferred, *EMA_ROLES, *RAW_ROLES)
    order = {"ema": EMA_ROLES, "raw": RAW_ROLES, "auto": auto}[weights]
    by_role = (
        _only_model([group for group in groups if role_of(group) == role], groups) for role in order
    )
    fitting = [group for group in by_role if group is not None]
    if fitting:
        return next((group for group in fitting if _is_known(groups[group])), fitting[0])
    rest = [group for group in groups if role_of(group) not in OTHER_ROLES]
    if weights == "auto" and (group := _only_model(rest, groups)):
        return group
    names = ", ".join(groups)[:400]
    if weights == "auto":
        raise ValueError(
            f"holds {names}, and none of generator_ema, generator, model, state_dict:"
            " save the generator's state dict alone"
        )
    raise ValueError(
        f"has no {weights} weights, only {names}:"
        " use weights=auto (on the command line --weights auto)"
    )


def _is_known(stored: Collection[str]) -> bool:
    return read_layout(stored).kind != "unknown"


def _only_model(candidates: Sequence[str], groups: Mapping[str, Collection[str]]) -> str | None:
    """Return the only candidate, or the only one of a known kind; None without candidates."""
    if len(candidates) < 2:
        return next(iter(candidates), None)
    models = [group for group in candidates if _is_known(groups[group])]
    if len(models) > 1:
        raise ValueError(f"holds two models, {' and '.join(models[:2])}: save one of them alone")
    return next(iter(models or candidates))


def read_config(tensors: Mapping[str, Tensor], stated: Mapping[str, object]) -> WanConfig:
    """Read the sizes of a transformer from its tensors, by Wan's names.

    Heads have size 128 unless `stated` (`transformer` in metadata `config`) gives num_heads; it may
    also give text_len. Raises ValueError (without the file's name) when a tensor that determines a
    size is missing or misshapen, or when sizes do not fit together.
    """
    dim = _size(tensors, "head.modulation", 3, -1)
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    heads = _stated(stated, "num_heads", dim // HEAD_DIM)
    if heads == 0:
        raise ValueError(
            f"is {dim} wide, too narrow for heads of {HEAD_DIM}:"
            " metadata `config` must give num_heads"
        )
    return WanConfig(
        dim=dim,
        num_heads=heads,
        ffn_dim=_size(tensors, "blocks.0.ffn.0.weight", 2, 0),
        num_layers=len(blocks),
        in_dim=_size(tensors, "patch_embedding.weight", 5, 1),
        out_dim=_size(tensors, "head.head.weight", 2, 0) // 4,
        text_dim=_size(tensors, "text_embedding.0.weight", 2, 1),
        text_len=_stated(stated, "text_len", WanConfig().text_len),
        freq_dim=_size(tensors, "time_embedding.0.weight", 2, 1),
    )


def _size(tensors: Mapping[str, Tensor], name: str, axes: int, axis: int) -> int:
    if name not in tensors:
        raise ValueError(
            f"lacks {name}, which determines the model's size: the file is not complete"
        )
    if tensors[name].ndim != axes:
        raise ValueError(
            f"has a {name} of shape {list(tensors[name].shape)}, which should have {axes} axes:"
            " not Wan2.1"
        )
    return tensors[name].shape[axis]


def _stated(stated: Mapping[str, object], key: str, default: int) -> int:
    value = stated.get(key)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return value if is_integer and value > 0 else default


def other_model(config: WanConfig, names: Collection[str]) -> str | None:
    """Name a transformer that is not Wan2.1 text-to-video of 16 channels; None when it is."""
    if (config.in_dim, config.out_dim) == (48, 48):
        return "Wan2.2 5B (48 latent channels)"
    if any(name.startswith("vace_") for name in names):
        return "Wan2.1 VACE"
    if config.in_dim == 36 or any(
        name.startswith(("img_emb.", "condition_embedder.image_embedder.")) for name in names
    ):
        return "Wan2.1 image-to-video (36 input channels with img_emb)"
    if (config.in_dim, config.out_dim) != (16, 16):
        return f"a model of {config.in_dim} input and {config.out_dim} output channels"
    return None
