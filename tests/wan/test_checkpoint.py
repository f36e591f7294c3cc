"""Files in the exact key layouts of published ones, with random weights, load bit for bit."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published import (
    CONFIG,
    FSDP,
    State,
    equal_bits,
    in_diffusers,
    make_state,
    message,
    prefixed,
    write,
    write_14b,
)

from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.checkpoint import (
    describe,
    inspect,
    load_transformer,
    read_transformer,
)
from autorefiner.refiner.wan.layouts import INSTEAD
from autorefiner.refiner.wan.published import FRAGMENTS, LORAS, MODELS
from autorefiner.refiner.wan.transformer import WAN_14B, WanConfig


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


def wrapped(state: State) -> State:
    """Rename as torch.compile and activation checkpointing of single blocks do."""
    return {
        "model._orig_mod."
        + re.sub(r"^(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", name): tensor
        for name, tensor in state.items()
    }


# A second model in the file, which must not be loaded.
OTHER = {"model.blocks.0.self_attn.q.weight": torch.zeros(2, 2)}


def flat(prefix: str) -> Callable[[State], State]:
    """Return a function that puts a prefix before all names."""
    return lambda state: prefixed(state, prefix)


# fmt: off
LAYOUTS = {
    # name: (file, its content, top key, preset)
    "self-forcing": ("checkpoints/self_forcing_dmd.pt", lambda s: {
        "generator": OTHER, "generator_ema": prefixed(s, "model."), "critic": OTHER,
        }, "generator_ema", "self-forcing"),
    "ode init, top key model": ("ode_init.pt", lambda s: {
        "model": prefixed(s, "model.")}, "model", None),
    "causvid": ("autoregressive_checkpoint/model.pt", lambda s: {
        "generator": prefixed(s, "model."), "critic": OTHER}, "generator", "causvid"),
    "longlive base": ("models/longlive_base.pt", lambda s: {
        "generator": prefixed(s, "model.")}, "generator", "longlive"),
    "chunkwise": ("Causal-Forcing/chunkwise/causal_forcing.pt", lambda s: {
        "generator_ema": OTHER, "generator": prefixed(s, "model.")}, "generator", "causal-forcing"),
    "framewise": ("framewise/causal_forcing.pt", lambda s: {
        "generator_ema": prefixed(s, FSDP)}, "generator_ema", "causal-forcing-framewise"),
    "2-step": ("causal-forcing++/framewise-2step.pt", lambda s: {
        "generator_ema": prefixed(s, FSDP)}, "generator_ema", "causal-forcing-2step"),
    "1-step": ("causal-forcing++/framewise-1step.pt", lambda s: {
        "generator_ema": prefixed(s, FSDP)}, "generator_ema", "causal-forcing-1step"),
    "long video": ("chunkwise/longvideo.pt", lambda s: {
        "generator_ema": prefixed(s, FSDP), "generator": OTHER}, "generator_ema", None),
    "wrapped flat": ("model_400.safetensors", flat("model."), "flat", None),
    "plain": ("wan.safetensors", dict, "flat", None),
    "comfyui checkpoint": ("wan.safetensors", flat("model.diffusion_model."), "flat", None),
    "comfyui model": ("wan.safetensors", flat("diffusion_model."), "flat", None),
    "net.": ("wan.safetensors", flat("net."), "flat", None),
    "state_dict": ("wan.pth", lambda s: {"state_dict": s, "step": 5}, "state_dict", None),
    "compiled, checkpointed": ("wan.pt", lambda s: {"generator": wrapped(s)}, "generator", None),
    "diffusers": ("diffusion_pytorch_model.safetensors", in_diffusers, "flat", None),
    "one unknown top key": ("wan.pt", lambda s: {"params": s}, "params", None),
}
# fmt: on


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_bit_for_bit(layout: str, state: State, tmp_path: Path) -> None:
    name, make, top_key, preset = LAYOUTS[layout]
    path = write(tmp_path / name, make(state))
    model, info = load_transformer(path)
    assert equal_bits(model.state_dict(), state)
    assert not model.training and not any(
        parameter.requires_grad for parameter in model.parameters()
    )
    assert info == inspect(path)
    assert (info.kind, info.top_key, info.preset, info.config) == (
        "transformer",
        top_key,
        preset,
        CONFIG,
    )
    assert (info.tensors, info.dtypes) == (len(state), ("bfloat16",))
    assert info.nbytes == sum(tensor.nbytes for tensor in state.values())


def test_diffusers_norm2_is_our_norm3(state: State) -> None:
    assert torch.equal(in_diffusers(state)["blocks.1.norm2.weight"], state["blocks.1.norm3.weight"])
    assert not any("norm3" in name for name in in_diffusers(state))


def test_the_report_names_what_was_removed(state: State, tmp_path: Path) -> None:
    info = inspect(
        write(
            tmp_path / "a.pt",
            {"generator_ema": prefixed(state, FSDP), "critic": OTHER, "step": 600},
        )
    )
    assert (info.prefix, info.infixes) == ("model.", ("_fsdp_wrapped_module.",))
    assert info.other_keys == ("critic", "step")
    lines = describe(info).splitlines()
    assert "removed   model. _fsdp_wrapped_module." in lines
    assert "weights   generator_ema (also in it: critic, step)" in lines
    assert any(
        line.startswith("sizes     width 256, 2 layers, 2 heads, feed-forward 256")
        for line in lines
    )
    assert f"tensors   {len(state)}, bfloat16, 3.93 MB" in lines
    assert {line[9] for line in lines} == {" "}


# ---- which weights


def test_averaged_or_raw_weights_by_request(state: State, tmp_path: Path) -> None:
    raw = make_state(1)
    both = {"generator": prefixed(raw, "model."), "generator_ema": prefixed(state, "model.")}
    path = write(tmp_path / "a.pt", both)
    for weights, right in (("auto", state), ("ema", state), ("raw", raw)):
        assert equal_bits(load_transformer(path, weights=weights)[0].state_dict(), right)
    assert "'best'" in message(path, weights="best")


def test_a_name_known_to_use_raw_weights_is_followed_and_noted(
    state: State, tmp_path: Path
) -> None:
    both = {
        "generator": prefixed(state, "model."),
        "generator_ema": prefixed(make_state(1), "model."),
    }
    info = inspect(write(tmp_path / "longlive_base.pt", both))
    assert info.top_key == "generator"
    assert "weights=ema takes generator_ema" in info.notes[0]


def test_weights_that_are_not_there(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {"generator": prefixed(state, "model."), "critic": OTHER})
    assert "no ema" in message(path, weights="ema")
    path = write(tmp_path / "b.pt", {"critic": OTHER, "fake_score": OTHER})
    assert "critic, fake_score" in message(path)


# ---- metadata and presets


def test_metadata_gives_heads_text_length_and_preset(state: State, tmp_path: Path) -> None:
    stated = {"transformer": {"causal_ar": True, "num_heads": 4, "text_len": 16, "num_layers": 9}}
    metadata = {"config": json.dumps(stated), "autorefiner": json.dumps({"preset": "self-forcing"})}
    path = write(tmp_path / "krea.safetensors", state, metadata)
    model, info = load_transformer(path)
    right = WanConfig(dim=256, num_heads=4, ffn_dim=256, num_layers=2, text_dim=64, text_len=16)
    assert info.config == model.config == right
    assert (info.preset, info.preset_reason) == ("self-forcing", "its metadata names it")
    assert info.metadata == metadata


@pytest.mark.parametrize(
    "config",
    ["{", "[]", '"x"', '{"transformer": 3}', "[" * 100_000]
    + [json.dumps({"transformer": {"num_heads": heads}}) for heads in ("many", -2, 0, True, 2.5)],
)
def test_malformed_metadata_is_ignored(config: str, state: State, tmp_path: Path) -> None:
    info = inspect(write(tmp_path / "a.safetensors", state, {"config": config, "autorefiner": "{"}))
    assert info.config == CONFIG
    assert any("'autorefiner'" in note for note in info.notes)


def test_impossible_heads_in_metadata(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", state, {"config": '{"transformer": {"num_heads": 3}}'})
    assert inspect(path).config is None
    assert "3 heads" in message(path)


def test_a_narrow_model_needs_its_heads_in_metadata(tmp_path: Path) -> None:
    config = WanConfig(dim=64, num_heads=2, ffn_dim=64, num_layers=1, text_dim=8)
    narrow = make_state(config=config)
    assert "num_heads" in message(write(tmp_path / "a.safetensors", narrow))
    path = write(
        tmp_path / "b.safetensors", narrow, {"config": '{"transformer": {"num_heads": 2}}'}
    )
    assert load_transformer(path)[0].config == config


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            lambda s: {"generator_ema": prefixed(s, "model."), "generator": OTHER},
            "cannot tell Self-Forcing",
        ),
        (lambda s: {"generator_ema": prefixed(s, FSDP)}, "frame-wise, 2-step, 1-step"),
        (
            lambda s: {"generator": prefixed(s, "model."), "critic": OTHER},
            "cannot tell CausVid, LongLive",
        ),
        (lambda s: prefixed(s, "model."), "the training wrapper's names"),
        (dict, "plain Wan2.1"),
    ],
)
def test_keys_alone_never_decide_what_they_cannot(
    content, reason: str, state: State, tmp_path: Path
) -> None:
    info = inspect(write(tmp_path / "x" / "y" / "model.pt", content(state)))
    assert info.preset is None
    assert reason in info.preset_reason and "pass --preset" in info.preset_reason


def test_the_presets_named_here_exist() -> None:
    assert {preset for _, preset in FRAGMENTS} | {
        row.preset for row in (*MODELS, *LORAS) if row.preset
    } <= set(PRESETS)


def test_krea_is_known_by_its_name_and_size_without_reading_data(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "y"  # the folder of the test itself says Krea
    folder.mkdir(parents=True)
    info = inspect(write_14b(folder / "14b_400.safetensors", "model."))
    assert (info.config, info.tensors, info.nbytes) == (WAN_14B, 1095, 28_576_983_168)
    assert (info.preset, "published name" in info.preset_reason) == ("krea-14b", True)
    assert "28.58 GB" in describe(info)
    plain = inspect(write_14b(folder / "wan2.1_t2v_14B.safetensors", ""))
    assert plain.preset is None and "not autoregressive" in plain.preset_reason
    named = inspect(write_14b(folder / "self_forcing_14b.safetensors", ""))
    assert named.preset is None and named.likely[0] == "self-forcing-14b"


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_stored_dtype_is_kept(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert equal_bits(
        load_transformer(write(tmp_path / "a.safetensors", stored))[0].state_dict(), stored
    )


def test_another_dtype_by_request(state: State, tmp_path: Path) -> None:
    model, info = load_transformer(write(tmp_path / "a.pt", state), dtype=torch.float32)
    assert equal_bits(model.state_dict(), {name: tensor.float() for name, tensor in state.items()})
    assert info.dtypes == ("bfloat16",)
    with pytest.raises(ValueError, match="dtype"):
        load_transformer(tmp_path / "a.pt", dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("most", "runs"), [(torch.float8_e4m3fn, torch.bfloat16), (torch.float16, torch.float16)]
)
def test_mixed_files_run_in_the_dtype_of_most_bytes_and_fp8_in_bf16(
    most, runs, state: State, tmp_path: Path
) -> None:
    stored = {
        name: tensor.to(most) if tensor.ndim == 2 else tensor.float()
        for name, tensor in state.items()
    }
    path = write(tmp_path / "a.safetensors", stored)
    model, info = load_transformer(path)
    assert equal_bits(
        model.state_dict(), {name: tensor.to(runs) for name, tensor in stored.items()}
    )
    assert info.dtypes == (str(most).removeprefix("torch."), "float32")


def test_quantised_files_are_refused(state: State, tmp_path: Path) -> None:
    for key in (
        "scaled_fp8",
        "blocks.0.ffn.0.scale_weight",
        "blocks.0.ffn.0.weight_scale",
        "blocks.0.ffn.0.comfy_quant",
    ):
        scaled = state | {key: torch.zeros(1)}
        assert key in message(write(tmp_path / "a.safetensors", scaled))
    whole = state | {"blocks.0.ffn.0.weight": torch.zeros(256, 256, dtype=torch.int8)}
    path = write(tmp_path / "b.safetensors", whole)
    assert "blocks.0.ffn.0.weight in torch.int8" in message(path)
    assert "blocks.0.ffn.0.weight in torch.int8" in message(path, dtype=torch.float32)


def test_a_host_with_modules_of_its_own_reads_what_is_complete(
    state: State, tmp_path: Path
) -> None:
    weights, info = read_transformer(write(tmp_path / "a.safetensors", prefixed(state, "model.")))
    assert set(weights) == set(state) and info.config.num_layers == 2
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
    incomplete = {name: tensor for name, tensor in state.items() if name != "head.head.bias"}
    with pytest.raises(ValueError, match=r"head\.head\.bias"):
        read_transformer(write(tmp_path / "b.safetensors", incomplete))


def test_changing_loaded_weights_leaves_the_file_alone(state: State, tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        path = write(tmp_path / name, state)
        before = path.read_bytes()
        model, _ = load_transformer(path)
        for parameter in model.parameters():
            parameter.zero_()
        assert path.read_bytes() == before


# ---- files that are something else


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("lora", ["diffusion_model.blocks.0.ffn.0.lora_A.weight"]),
        (
            "refiner",
            [
                "autorefiner.blocks.0.ffn.0.lora_A.weight",
                "autorefiner.blocks.0.ffn.0.lora_B.weight",
            ],
        ),
        ("vae", ["decoder.head.0.gamma"]),
        ("vae", ["first_stage_model.decoder.head.0.gamma"]),
        ("text encoder", ["encoder.block.0.layer.0.SelfAttention.q.weight"]),
        ("text encoder", ["blocks.0.pos_embedding.embedding.weight"]),
    ],
)
def test_other_kinds_are_named(kind: str, names: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {name: torch.zeros(2, 2) for name in names})
    info = inspect(path)
    assert (info.kind, info.config, info.preset, info.preset_reason) == (
        kind,
        None,
        None,
        f"a {kind} file has none",
    )
    assert INSTEAD[kind] in message(path)


def test_other_video_models_are_named(state: State, tmp_path: Path) -> None:
    def with_channels(inside: int, outside: int) -> State:
        head = torch.zeros(outside * 4, 256)
        patch = torch.zeros(256, inside, 1, 2, 2)
        return state | {
            "patch_embedding.weight": patch,
            "head.head.weight": head,
            "head.head.bias": head[:, 0],
        }

    image = "Wan2.1 image-to-video"
    cases = [
        (with_channels(36, 16), image),
        (state | {"img_emb.proj.0.weight": torch.zeros(2)}, image),
        (
            in_diffusers(state)
            | {"condition_embedder.image_embedder.norm1.weight": torch.zeros(2)},
            image,
        ),
        (with_channels(48, 48), "Wan2.2 5B (48 latent channels)"),
        (state | {"vace_blocks.0.self_attn.q.weight": torch.zeros(2)}, "Wan2.1 VACE"),
        (with_channels(32, 16), "a model of 32 input and 16 output channels"),
    ]
    for number, (content, text) in enumerate(cases):
        path = write(tmp_path / f"self_forcing_{number}.safetensors", content)
        assert f"looks like {text}" in message(path)
        assert inspect(path).preset is None and text in inspect(path).preset_reason


def test_incomplete_models(state: State, tmp_path: Path) -> None:
    def without(*words: str) -> State:
        return {
            name: tensor
            for name, tensor in state.items()
            if not any(word in name for word in words)
        }

    cases = {
        "blocks.0.self_attn.k.weight": (without("blocks.0.self_attn.k.", "blocks.0.self_attn.v.")),
        "head.modulation": without("head.modulation"),
        "head.modulation of shape [256]": state | {"head.modulation": torch.zeros(256)},
        "blocks.0.extra": state | {"blocks.0.extra": torch.zeros(1)},
        "blocks.0.ffn.2.bias of [7]": state | {"blocks.0.ffn.2.bias": torch.zeros(7)},
    }
    for number, (text, content) in enumerate(cases.items()):
        path = write(tmp_path / f"{number}.safetensors", content)
        assert text in message(path)
        assert inspect(path).kind == "transformer"


def test_names_that_collide_once_cleaned(state: State, tmp_path: Path) -> None:
    double = prefixed(state, "model.") | {FSDP + "head.modulation": torch.zeros(1)}
    assert "two tensors" in message(write(tmp_path / "a.pt", double))
    double = prefixed(state, "model.") | {"head.modulation": torch.zeros(1)}
    assert "two tensors" in message(write(tmp_path / "b.pt", double))
