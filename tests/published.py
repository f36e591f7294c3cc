"""Random weights in the key layouts of published files, and helpers to test loading them."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autorefiner.refiner.wan.checkpoint import load_transformer
from autorefiner.refiner.wan.transformer import WAN_14B, WanConfig, WanTransformer

CONFIG = WanConfig(dim=256, num_heads=2, ffn_dim=256, num_layers=2, text_dim=64)
FSDP = "model._fsdp_wrapped_module."
State = dict[str, Tensor]


def make_state(
    seed: int = 0, config: WanConfig = CONFIG, dtype: torch.dtype = torch.bfloat16
) -> State:
    with torch.device("meta"):
        shapes = WanTransformer(config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in shapes.items()
    }


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def equal_bits(found: State, right: State) -> bool:
    return list(found) == list(right) and all(
        found[name].dtype == right[name].dtype and torch.equal(found[name], right[name])
        for name in right
    )


def message(path: Path | str, **options) -> str:
    """Return the error of loading a file, which must be one line that names it."""
    with pytest.raises(ValueError) as raised:
        load_transformer(path, **options)
    text = str(raised.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def write(path: Path, content, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(
            {name: tensor.contiguous() for name, tensor in content.items()}, path, metadata=metadata
        )
    else:
        torch.save(content, path)
    return path


def diffusers_name(name: str) -> str:
    """Map a parameter name to diffusers', written independently of the loader."""
    if not name.startswith("blocks."):
        for ours, theirs in (
            ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
            ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
            ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
            ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
            ("time_projection.1", "condition_embedder.time_proj"),
            ("head.modulation", "scale_shift_table"),
            ("head.head", "proj_out"),
        ):
            name = name.replace(ours, theirs)
        return name
    name = re.sub(r"_attn\.([qkv])\.", r"_attn.to_\1.", name).replace("_attn.o.", "_attn.to_out.0.")
    name = (
        name.replace("self_attn", "attn1").replace("cross_attn", "attn2").replace("norm3", "norm2")
    )
    name = name.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
    return name.replace("modulation", "scale_shift_table")


def in_diffusers(state: State) -> State:
    return {diffusers_name(name): tensor for name, tensor in state.items()}


def write_14b(path: Path, prefix: str = "", rename: Callable[[str], str] = str) -> Path:
    """Write a sparse 28.6 GB file of a 14B model: a header followed by a hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = WanTransformer(WAN_14B).state_dict()
    header, end = {}, 0
    for name, tensor in shapes.items():
        start, end = end, end + 2 * tensor.numel()
        header[prefix + rename(name)] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    os.truncate(path, 8 + len(encoded) + end)
    return path
