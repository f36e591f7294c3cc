"""The scale of a LoRA comes from its tensors, its metadata, or adapter_config.json beside it."""

import json
from pathlib import Path

import pytest
import torch
from lora_files import make_lora, merged
from published import State, equal_bits, make_state, write
from safetensors.torch import save_file

from autorefiner.refiner.wan.checkpoint import describe, inspect, load_transformer
from autorefiner.refiner.wan.lora import read_lora


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


def test_alpha_scales_a_lora(state: State, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state)
    lora = make_lora(state, 4)
    alphas = {
        name.replace("lora_A.weight", "alpha"): torch.tensor(2.0)
        for name in lora
        if "lora_A" in name
    }
    model, _ = load_transformer(base, lora=write(tmp_path / "lora.safetensors", lora | alphas))
    assert equal_bits(model.state_dict(), merged(state, lora, 0.5))


def scaled(state: State, tmp_path: Path, lora: Path) -> float:
    """Return the scale that a LoRA was merged with, from the change of one weight."""
    base = write(
        tmp_path / "base.safetensors", {name: tensor.float() for name, tensor in state.items()}
    )
    model, _ = load_transformer(base, lora=lora, dtype=torch.float32)
    name = "blocks.0.ffn.0.weight"
    change = model.state_dict()[name] - state[name].float()
    unit = merged({name: torch.zeros_like(change)}, make_lora(state, 4))[name]
    return (change * unit).sum().item() / unit.square().sum().item()


RSLORA = {"lora_alpha": 8, "r": 4, "use_rslora": True}
STATED = {  # where alpha is said, and the scale of rank 4 that it means
    "SimpleTuner": ({"transformer.lora_alpha": "16", "transformer.r": "4"}, 4.0),
    "diffusers": (
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2, "transformer.r": 4})},
        0.5,
    ),
    "diffusers, rsLoRA": (
        {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in RSLORA.items()})},
        4,
    ),
    "kohya": ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, 0.5),
    "bare": ({"lora_alpha": "1"}, 0.25),
    "nothing": ({"format": "pt"}, 1.0),
}


@pytest.mark.parametrize("form", STATED)
def test_an_alpha_in_the_metadata_scales_a_lora(form: str, state: State, tmp_path: Path) -> None:
    metadata, scale = STATED[form]
    save_file(make_lora(state, 4), tmp_path / "lora.safetensors", metadata=metadata)
    assert scaled(state, tmp_path, tmp_path / "lora.safetensors") == pytest.approx(scale, rel=1e-4)
    assert f"scale {scale:g}" in describe(inspect(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize("given", ["file", "folder"])
@pytest.mark.parametrize(
    ("config", "scale"), [({"lora_alpha": 16, "r": 4}, 4), (RSLORA, 4), ({"lora_alpha": 1}, 0.25)]
)
def test_an_alpha_in_adapter_config_scales_a_lora(
    given, config, scale, state: State, tmp_path: Path
) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(make_lora(state, 4), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    path = folder if given == "folder" else folder / "adapter_model.safetensors"
    assert scaled(state, tmp_path, path) == pytest.approx(scale, rel=1e-4)


def test_an_alpha_pattern_matches_names_as_they_are_stored(state: State, tmp_path: Path) -> None:
    down, up = torch.zeros(4, 256), torch.zeros(256, 4)
    stem = "transformer.blocks.0.attn1.to_q"
    save_file(
        {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"alpha_pattern": {"attn1.to_q": 12}, "lora_alpha": 4})
    )
    assert read_lora(tmp_path)["blocks.0.self_attn.q"].scale == 3


def test_an_alpha_pattern_is_of_its_modules_and_a_tensor_goes_before_all(
    state: State, tmp_path: Path
) -> None:
    patterns = {"alpha_pattern": {"ffn.0": 12, "fn.2": 99}, "lora_alpha": 4}
    path, lora = tmp_path / "adapter_model.safetensors", make_lora(state, 4)
    (tmp_path / "adapter_config.json").write_text(json.dumps(patterns))
    save_file(lora, path)
    scales = {module: pair.scale for module, pair in read_lora(path).items()}
    assert scales["blocks.0.ffn.0"] == 3
    assert scales["blocks.0.ffn.2"] == scales["blocks.1.self_attn.q"] == 1, (
        "a pattern is of whole names"
    )
    save_file(lora | {"base_model.model.blocks.0.ffn.0.alpha": torch.tensor(2.0)}, path)
    assert read_lora(path)["blocks.0.ffn.0"].scale == 0.5


@pytest.mark.parametrize(
    ("metadata", "config", "keyword"),
    [
        ({"lora_alpha": "many"}, None, "alpha"),
        ({"lora_alpha": "1" + "0" * 400}, None, "alpha"),
        ({"lora_alpha": "1e999"}, None, "alpha"),
        ({"lora_alpha": "nan"}, None, "alpha"),
        ({"lora_alpha": "true"}, None, "alpha"),
        ({"lora_adapter_metadata": "{"}, None, "lora_adapter_metadata"),
        ({"lora_adapter_metadata": "[1]"}, None, "lora_adapter_metadata"),
        ({}, "{", "adapter_config.json"),
        ({}, '{"lora_alpha": 4, "use_dora": true}', "DoRA"),
        ({}, '{"lora_alpha": 4, "use_rslora": "maybe"}', "maybe"),
        ({}, '{"lora_alpha": 4, "alpha_pattern": [1]}', "table"),
        ({"lora_alpha": "8"}, '{"lora_alpha": 4}', "alpha"),
    ],
)
def test_a_scale_that_is_not_understood_is_refused(
    metadata, config, keyword, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file(make_lora(state, 4), path, metadata=metadata)
    if config:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match=keyword) as error:
        read_lora(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert keyword in describe(inspect(path))
