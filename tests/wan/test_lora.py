"""LoRA files, of LongLive and others, merge into the base weights as the arithmetic says."""

import re
from pathlib import Path

import pytest
import torch
from published import State, equal_bits, make_state, prefixed, write
from torch import Tensor

from autorefiner.refiner.wan.checkpoint import describe, inspect, load_transformer


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


LINEAR = re.compile(r"(blocks\.\d+\.(?:self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02]))\.weight")


OTHER = {"a": torch.zeros(1)}  # what stands beside the LoRA in its file


def make_lora(state: State, rank: int, form: str = "base_model.model.{}.lora_{}.weight") -> State:
    generator = torch.Generator().manual_seed(7)
    lora = {}
    for name, weight in state.items():
        if match := LINEAR.fullmatch(name):
            lora[form.format(match[1], "A")] = torch.randn(rank, weight.shape[1], generator=generator) / 16
            lora[form.format(match[1], "B")] = torch.randn(weight.shape[0], rank, generator=generator) / 16
    return lora


def merged(state: State, lora: State, scale: float = 1.0) -> State:
    def with_lora(name: str, weight: Tensor) -> Tensor:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in lora:
            return weight
        delta = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
        return (weight.float() + scale * delta).to(weight.dtype)

    return {name: with_lora(name, weight) for name, weight in state.items()}


@pytest.mark.parametrize(
    "wrap", [dict, lambda lora: {"generator_lora": lora, "critic_lora": OTHER, "generator": OTHER, "step": 1}]
)
def test_longlive_is_base_plus_lora(wrap, state: State, tmp_path: Path) -> None:
    folder = tmp_path / "x" / "y"  # the folder of the test itself says LongLive
    base = write(folder / "base.pt", {"generator": prefixed(state, "model.")})
    lora = make_lora(state, 256)
    path = write(folder / "lora.pt", wrap(lora))
    model, info = load_transformer(base, lora=path)
    assert equal_bits(model.state_dict(), merged(state, lora))
    assert (info.merged_lora, info.preset) == (20, "longlive")
    assert "rank 256 on every linear layer" in info.preset_reason
    assert "LoRA      merged into 20 weights" in describe(info)


def test_a_lora_file_is_told(state: State, tmp_path: Path) -> None:
    info = inspect(write(tmp_path / "lora.pt", {"generator_lora": make_lora(state, 8), "critic_lora": OTHER}))
    assert (info.kind, info.top_key, info.notes) == ("lora", "generator_lora", ("rank 8 on 20 linear layers",))


def test_a_lora_of_zeros_changes_nothing(state: State, tmp_path: Path) -> None:
    base = write(tmp_path / "base.pt", {"generator": prefixed(state, "model.")})
    lora = {name: torch.zeros_like(part) for name, part in make_lora(state, 4).items()}
    model, info = load_transformer(base, lora=write(tmp_path / "lora.safetensors", lora))
    assert equal_bits(model.state_dict(), state)
    assert info.preset is None


@pytest.mark.parametrize(
    "form",
    [
        "base_model.model.{}.lora_{}.default.weight",
        "base_model.model.model._fsdp_wrapped_module.{}.lora_{}.weight",
        "diffusion_model.{}.lora_{}.weight",
        "{}.lora_{}.weight",
    ],
)
def test_other_lora_names(form: str, state: State, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state)
    path = write(tmp_path / "lora.safetensors", make_lora(state, 4, form))
    model, _ = load_transformer(base, lora=path, dtype=torch.float32)
    whole = {name: tensor.float() for name, tensor in state.items()}
    assert equal_bits(model.state_dict(), merged(whole, make_lora(state, 4)))


def test_alpha_scales_a_lora(state: State, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state)
    lora = make_lora(state, 4)
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(2.0) for name in lora if "lora_A" in name}
    model, _ = load_transformer(base, lora=write(tmp_path / "lora.safetensors", lora | alphas))
    assert equal_bits(model.state_dict(), merged(state, lora, 0.5))


def test_loras_that_do_not_fit(state: State, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state)
    lora, key = make_lora(state, 4), "base_model.model.blocks.1.ffn.0.lora_"
    cases = {
        "has 20 of 20 LoRA targets that the model lacks (layers.0.": {
            name.replace("blocks", "layers"): part for name, part in lora.items()
        },
        "has a LoRA of [256, 8] for blocks.1.ffn.0, which is [256, 256]": lora | {key + "A.weight": torch.zeros(4, 8)},
        "has half a pair for blocks.1.ffn.0": {n: part for n, part in lora.items() if n != key + "B.weight"},
        "do not multiply": lora | {key + "A.weight": torch.zeros(3, 256)},
        "parts of [256, 0] and [0, 256]": lora
        | {key + "A.weight": torch.zeros(0, 256), key + "B.weight": torch.zeros(256, 0)},
        "parts of [256, 4] and []": lora | {key + "A.weight": torch.zeros(())},
        "an alpha of [2] for blocks.1.ffn.0": lora | {"base_model.model.blocks.1.ffn.0.alpha": torch.zeros(2)},
        "has blocks.0.diff, which is no part of a LoRA pair": lora | {"blocks.0.diff": torch.zeros(1)},
        "is not a LoRA but a file of kind 'transformer'": state,
    }
    for number, (text, content) in enumerate(cases.items()):
        path = write(tmp_path / f"{number}.safetensors", content)
        assert inspect(path).kind in ("lora", "transformer")  # looking at it is never an error
        with pytest.raises(ValueError) as raised:
            load_transformer(base, lora=path)
        assert text in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)
