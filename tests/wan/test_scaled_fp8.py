"""Transformers in scaled fp8 are multiplied out on load, and stay as stored for ComfyUI."""

import json
from pathlib import Path

import pytest
import torch
from published import State, make_state, message, prefixed, write
from torch import Tensor

from autorefiner.refiner.job import prepare
from autorefiner.refiner.request import GenerateOptions
from autorefiner.refiner.wan.checkpoint import inspect, load_transformer, read_transformer
from autorefiner.refiner.wan.fp8 import scale_names

FP8 = torch.float8_e4m3fn
QUERY = "blocks.0.self_attn.q."


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


def scaled(
    state: State, scale_name: str, shape: str = "number", form: torch.dtype = FP8
) -> tuple[State, State]:
    """Return blocks' linear layers in fp8 with scales of this name, and the same multiplied out."""
    stored, right = {}, {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or not name.startswith("blocks."):
            stored[name] = right[name] = tensor
            continue
        rows = tensor.float().abs().amax(dim=1, keepdim=True) / torch.finfo(form).max
        scale = {"number": rows.max(), "one": rows.max()[None], "rows": rows[:, 0], "column": rows}[
            shape
        ]
        by_row: Tensor = scale if scale.numel() == 1 else scale.reshape(-1, 1)
        stored[name] = (tensor.float() / by_row).to(form)
        stored[name.removesuffix("weight") + scale_name] = scale
        right[name] = (stored[name].float() * by_row).to(torch.bfloat16)
    return stored, right


def marked(stored: State) -> State:
    """Add ComfyUI's older mark."""
    return stored | {"scaled_fp8": torch.zeros(2, dtype=FP8)}


def formatted(stored: State) -> State:
    """Add ComfyUI's newer note beside each scaled weight, and a scale of activations."""
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    layers = [
        name.removesuffix("weight_scale") for name in stored if name.endswith(".weight_scale")
    ]
    notes = {layer + "comfy_quant": note.clone() for layer in layers}
    return stored | notes | {QUERY + "input_scale": torch.tensor(1.0)}


@pytest.mark.parametrize("form", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", ["number", "one", "rows", "column"])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scales_of_every_name_and_shape_are_used(
    scale_name, shape, form, state, tmp_path: Path
) -> None:
    stored, right = scaled(state, scale_name, shape, form)
    path = write(tmp_path / "a.safetensors", prefixed(stored, "model."))
    model, info = load_transformer(path)
    assert info.kind == "transformer" and info.dtypes[0] == str(form).removeprefix("torch.")
    assert all(torch.equal(tensor, right[name]) for name, tensor in model.state_dict().items())
    handed, _ = read_transformer(path)
    assert set(handed) == set(state), "ComfyUI finds no scale by itself here"
    assert all(torch.equal(tensor, right[name]) for name, tensor in handed.items())


@pytest.mark.parametrize(
    ("scale_name", "mark"), [("scale_weight", marked), ("weight_scale", formatted)]
)
def test_what_comfyui_reads_itself_is_handed_on_as_stored(
    scale_name, mark, state, tmp_path: Path
) -> None:
    stored, right = scaled(state, scale_name)
    path = write(tmp_path / "a.safetensors", mark(stored))
    handed, _ = read_transformer(path)
    assert set(handed) == set(mark(stored))
    assert handed[QUERY + "weight"].dtype == FP8
    model, _ = load_transformer(path)
    assert all(torch.equal(tensor, right[name]) for name, tensor in model.state_dict().items())
    by_row, right = scaled(state, scale_name, "rows")
    handed, _ = read_transformer(write(tmp_path / "b.safetensors", mark(by_row)))
    assert set(handed) == set(state), "its layers take one number"
    assert all(torch.equal(tensor, right[name]) for name, tensor in handed.items())


def test_formats_in_the_header_are_left_to_comfyui(state, tmp_path: Path) -> None:
    stored, right = scaled(state, "weight_scale")
    layers = {
        name.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"}
        for name in stored
        if "_scale" in name
    }
    header = {"_quantization_metadata": json.dumps({"layers": layers})}
    path = write(tmp_path / "a.safetensors", stored, header)
    assert set(read_transformer(path)[0]) == set(stored)
    model, _ = load_transformer(path)
    assert all(torch.equal(tensor, right[name]) for name, tensor in model.state_dict().items())


def test_a_lora_is_merged_into_the_multiplied_weights(state, tmp_path: Path) -> None:
    stored, right = scaled(state, "weight_scale", "rows")
    down, up = torch.ones(2, 256), torch.full((256, 2), 0.25)
    lora = write(
        tmp_path / "lora.safetensors", {QUERY + "lora_A.weight": down, QUERY + "lora_B.weight": up}
    )
    model, _ = load_transformer(
        write(tmp_path / "a.safetensors", stored), lora=lora, dtype=torch.float32
    )
    exact = stored[QUERY + "weight"].float() * stored[QUERY + "weight_scale"].reshape(-1, 1)
    assert torch.equal(model.state_dict()[QUERY + "weight"], exact + 0.5)
    assert torch.equal(
        model.state_dict()["blocks.1.ffn.0.weight"].bfloat16(), right["blocks.1.ffn.0.weight"]
    )


def test_what_is_multiplied_out_is_counted_as_it_runs(state, tmp_path: Path) -> None:
    stored, right = scaled(state, "weight_scale", "rows")
    paths = [
        write(tmp_path / f"{name}.safetensors", weights)
        for name, weights in (("a", stored), ("b", right))
    ]
    options = {
        "preset": "self-forcing",
        "width": 64,
        "height": 64,
        "frames": 9,
        "dtype": "bf16",
        "dry_run": True,
    }
    narrow, wide = (
        prepare(
            GenerateOptions(model=str(path), out=tmp_path / "a.mp4", prompt="a", **options)
        ).estimate
        for path in paths
    )
    assert narrow == wide and narrow.weights == sum(tensor.nbytes for tensor in right.values())
    assert inspect(paths[0]).nbytes < inspect(paths[1]).nbytes


ONE = torch.ones(())
NVFP4 = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
# Tensors that are left out of a good file (by the end of their names), tensors that are put in, and
# a word of the error.
REFUSED = {
    "another name": ("", {QUERY + "scale_inv": ONE}, "quantised"),
    "a second scale": ("", {QUERY + "weight_scale_2": ONE}, "quantised"),
    "two scales": ("", {QUERY + "scale_weight": ONE}, "two scales"),
    "without its weight": ("", {"blocks.9.x.weight_scale": ONE}, "blocks.9.x"),
    "one lacks": (QUERY + "weight_scale", {}, "no scale"),
    "in blocks": ("", {QUERY + "weight_scale": torch.ones(2, 3)}, r"[2, 3]"),
    "of bf16": ("", {QUERY + "weight": torch.zeros(256, 256).bfloat16()}, "bfloat16"),
    "of int8": ("", {QUERY + "weight": torch.zeros(256, 256, dtype=torch.int8)}, "int8"),
    "a mark alone": ("weight_scale", {"scaled_fp8": torch.zeros(2)}, "scaled_fp8"),
    "another format": ("", {QUERY + "comfy_quant": NVFP4}, "nvfp4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_scales_that_would_be_left_out_are_refused(case: str, state, tmp_path: Path) -> None:
    removed, added, keyword = REFUSED[case]
    stored = scaled(state, "weight_scale")[0]
    if removed:
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith(removed)}
    path = write(tmp_path / "a.safetensors", stored | added)
    assert keyword in message(path)
    assert inspect(path).kind == "transformer"


def test_each_layer_of_a_block_needs_its_scale() -> None:
    layers = [
        f"blocks.0.{layer}"
        for layer in ("self_attn.v", "cross_attn.o", "ffn.2", "attn1.to_q", "attn2.to_k")
    ]
    for lacking in layers:
        stored = {f"{layer}.weight": torch.zeros(2, 2).to(FP8) for layer in layers}
        stored |= {f"{layer}.weight_scale": torch.ones(()) for layer in layers if layer != lacking}
        with pytest.raises(ValueError, match=lacking):
            scale_names(stored)
