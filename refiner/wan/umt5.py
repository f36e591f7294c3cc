"""umT5 encoder files in the layouts of Hugging Face, ComfyUI and Wan: sizes, names and model."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..reading import CONFIG_BYTES, read_json
from .fp8 import check_formats, scale_names, unscaled
from .layouts import INSTEAD, QUANTISED, choose_top_key, read_layout
from .tokenizer import PIP_LINE
from .weight_file import WeightFile, choose_dtype, open_weights

WAN_TOP = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
WAN_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
TOKENIZER_TENSOR = "spiece_model"  # ComfyUI's files carry the sentencepiece model as bytes
ATTENTION = "encoder.block.{}.layer.0.SelfAttention."


@dataclass(frozen=True, slots=True)
class Umt5File:
    """An umT5 encoder on disk.

    `names` maps Hugging Face's names to stored ones, `scales` stored names of fp8 weights to those
    of their scales; `sizes` are UMT5Config's arguments.
    """

    file: WeightFile
    group: str
    names: dict[str, str]
    sizes: dict[str, Any]
    tokenizer: bytes | None
    scales: dict[str, str] = field(default_factory=dict)

    @property
    def text_dim(self) -> int:
        return self.sizes["d_model"]

    def choose_dtype(self, wanted: torch.dtype | None) -> torch.dtype:
        """Return the dtype to run in: the wanted one, else the stored one, but bf16 for fp8."""
        group = self.file.groups[self.group]
        headers = {name: group[stored] for name, stored in self.names.items()}
        return choose_dtype(wanted, headers, self.file.path)

    def fingerprint(self) -> str:
        """Return a sha256 over every tensor's name, shape, dtype and first 64 values."""
        digest = hashlib.sha256(repr(sorted(self.sizes.items())).encode())
        group = self.file.groups[self.group]
        for name in sorted(group):
            digest.update(f"{name} {list(group[name].shape)} {group[name].dtype}".encode())
            digest.update(_first_bytes(self.file.read(self.group, name)))
        return digest.hexdigest()

    def load(self, dtype: torch.dtype, device: torch.device | str) -> torch.nn.Module:
        """Load transformers' UMT5EncoderModel; scaled fp8 is multiplied out."""
        try:
            from transformers import UMT5Config, UMT5EncoderModel
        except ImportError as error:
            raise ValueError(f"the umT5 text encoder needs transformers: {PIP_LINE}") from error
        with torch.device("meta"):
            model = UMT5EncoderModel(UMT5Config(**self.sizes))
        state = {name: self._read(name, dtype).to(device) for name in self.names}
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
        self._check_tensors(model.state_dict(), state)
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        stored = self.names[name]
        tensor = self.file.read(self.group, stored)
        if stored not in self.scales:
            return tensor.to(dtype)
        scale = self.file.read(self.group, self.scales[stored])
        try:
            return unscaled(tensor, scale, stored).to(dtype)
        except ValueError as error:
            raise ValueError(f"{self.file.path} {error}") from error

    def _check_tensors(self, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        for name, tensor in expected.items():
            if name not in state:
                raise ValueError(
                    f"{self.file.path} lacks {name}: the file is not complete, download it again"
                )
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"{self.file.path} has a {name} of {list(state[name].shape)}, which should be"
                    f" {list(tensor.shape)}: it is damaged"
                )
        if extra := sorted(set(state) - set(expected)):
            raise ValueError(
                f"{self.file.path} has {extra[0]}, which no umT5 encoder has: pass umT5-xxl"
            )


def _first_bytes(tensor: Tensor) -> bytes:
    return tensor.flatten()[:64].contiguous().view(torch.uint8).numpy().tobytes()


def open_umt5(path: Path | str) -> Umt5File:
    """Open an umT5 encoder, a Hugging Face folder or one weights file, without reading weights.

    Raises ValueError in one line for any other kind of file.
    """
    path = Path(path)
    stated = _folder_config(path) if os.path.isdir(path) else {}
    file = open_weights(path)
    try:
        group = choose_top_key(file.groups, "auto", None)
        layout = read_layout(file.groups[group])
        if layout.kind != "text encoder":
            raise ValueError(f"is {INSTEAD[layout.kind]}; the text encoder is umT5-xxl")
        rename = _hf_name if layout.naming == "wan" else str
        names = {rename(name): stored for name, stored in layout.names.items()}
        embedded = names.pop(TOKENIZER_TENSOR, None)
        names = {name: stored for name, stored in names.items() if _is_weight(name)}
        headers = file.groups[group]
        sizes = _sizes({name: headers[stored] for name, stored in names.items()}) | stated
        scales = scale_names(headers)
        check_formats(headers, lambda name: file.read(group, name))
        if embedded and headers[embedded].dtype != torch.uint8:
            raise ValueError(
                f"has a tokenizer of {headers[embedded].dtype}, which should be bytes:"
                " it is damaged"
            )
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    tokenizer = file.read(group, embedded).numpy().tobytes() if embedded else None
    return Umt5File(file, group, names, sizes, tokenizer, scales)


def _is_weight(name: str) -> bool:
    """Check that a tensor belongs to the encoder and is not a scale."""
    return not (name.startswith(("decoder.", "lm_head.")) or QUANTISED.search(name))


def _hf_name(name: str) -> str:
    block = re.match(r"blocks\.(\d+)\.(.+)\.(weight|scale_weight)$", name)
    if block and block[2] in WAN_BLOCK:
        return f"encoder.block.{block[1]}.{WAN_BLOCK[block[2]]}.{block[3]}"
    return WAN_TOP.get(name, name)


def _folder_config(folder: Path) -> dict[str, Any]:
    """Read the options of a folder's config.json that its tensors do not determine."""
    try:
        config = read_json(folder / "config.json", CONFIG_BYTES)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no config.json, so it is no encoder folder: pass one, or a weights file"
        ) from None
    except (ValueError, RecursionError):
        config = None
    kind = config.get("model_type") if isinstance(config, dict) else "not readable"
    if kind != "umt5":
        raise ValueError(
            f"{folder} has a config.json whose model_type is {kind}:"
            " pass an umT5 encoder's folder (umt5)"
        )
    options = ("relative_attention_max_distance", "layer_norm_epsilon")
    return {key: config[key] for key in options if key in config}


def _sizes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return UMT5Config's arguments from an encoder's tensors.

    Raises ValueError (without the file's name) when a tensor that determines a size is missing.
    """
    matches = [re.match(r"encoder\.block\.(\d+)\.", name) for name in tensors]
    layers = len({match[1] for match in matches if match})
    first_bias = ATTENTION.format(0) + "relative_attention_bias.weight"
    last_bias = ATTENTION.format(layers - 1) + "relative_attention_bias.weight"
    if layers > 1 and last_bias not in tensors and first_bias in tensors:
        raise ValueError(
            "is a T5 with one position table for all layers:"
            " Wan2.1 needs umT5-xxl, with one in each"
        )
    vocabulary, width = _shape(tensors, "shared.weight")
    buckets, heads = _shape(tensors, last_bias)
    inner, _ = _shape(tensors, ATTENTION.format(0) + "q.weight")
    hidden, _ = _shape(tensors, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors or tensors[name].ndim != 2 or not tensors[name].numel():
        raise ValueError(
            f"lacks {name}, which determines the encoder's size: pass a whole umT5 encoder"
        )
    rows, columns = tensors[name].shape
    return rows, columns
