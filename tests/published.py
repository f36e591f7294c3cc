"""Random weights in the key layouts of published files, and what tests of loading them share."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autorefiner.refiner.wan.checkpoint import load_transformer
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer

CONFIG = WanConfig(dim=256, num_heads=2, ffn_dim=256, num_layers=2, text_dim=64)
FSDP = "model._fsdp_wrapped_module."
State = dict[str, Tensor]


def make_state(seed: int = 0, config: WanConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> State:
    with torch.device("meta"):
        shapes = WanTransformer(config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in shapes.items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def equal_bits(found: State, right: State) -> bool:
    return list(found) == list(right) and all(
        found[name].dtype == right[name].dtype and torch.equal(found[name], right[name]) for name in right
    )


def message(path: Path | str, **options) -> str:
    """The error of loading a file, which must be one line that names it."""
    with pytest.raises(ValueError) as raised:
        load_transformer(path, **options)
    text = str(raised.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def write(path: Path, content, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path, metadata=metadata)
    else:
        torch.save(content, path)
    return path
