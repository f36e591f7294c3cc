"""A small random umT5 gives the context that transformers gives, from every layout."""

import json
import re
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autorefiner.refiner.cli import main
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import get_preset
from autorefiner.refiner.wan.text import load_text_encoder
from autorefiner.refiner.wan.tokenizer import Tokenizer, clean
from autorefiner.refiner.wan.transformer import WanConfig
from autorefiner.refiner.wan.vae import WanVAE

from tiny import tiny_network
from tiny_umt5 import PROMPTS, TEXT_LEN, WORDS, error, expected

State = dict[str, Tensor]


def wan_name(name: str) -> str:
    """Return Wan's name of a transformers tensor, independently of the loader's map."""
    name = name.replace("shared.", "token_embedding.").replace("encoder.final_layer_norm", "norm")
    name = name.replace("encoder.block", "blocks").replace("layer.0.SelfAttention", "attn")
    name = name.replace("attn.relative_attention_bias", "pos_embedding.embedding")
    name = name.replace("layer.0.layer_norm", "norm1").replace("layer.1.layer_norm", "norm2")
    for theirs, ours in (("wi_0", "gate.0"), ("wi_1", "fc1"), ("wo", "fc2")):
        name = name.replace(f"layer.1.DenseReluDense.{theirs}", f"ffn.{ours}")
    return name


# ---- the context


def test_a_hugging_face_folder_gives_what_transformers_gives(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = expected(folder, PROMPTS)

    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", no_network)
    encoder = load_text_encoder(folder, text_len=TEXT_LEN)
    context = encoder.encode(PROMPTS)
    assert context.shape == (3, encoder.text_len, encoder.text_dim) == (3, TEXT_LEN, 64)
    assert torch.equal(context, right)


def test_prompts_do_not_change_each_other(folder: Path) -> None:
    encoder = load_text_encoder(folder, text_len=TEXT_LEN)
    together = encoder.encode(PROMPTS)
    assert torch.equal(together, torch.cat([encoder.encode([prompt]) for prompt in PROMPTS]))


def test_behind_the_true_length_are_zeros(folder: Path) -> None:
    context = load_text_encoder(folder, text_len=TEXT_LEN).encode(["a red circle moves"])[0]
    assert (context[:5] != 0).all()  # four words and the end
    assert (context[5:] == 0).all()


def test_padding_is_not_attended_to(folder: Path) -> None:
    short = load_text_encoder(folder, text_len=6).encode(["a red circle"])
    long = load_text_encoder(folder, text_len=40).encode(["a red circle"])
    torch.testing.assert_close(long[:, :6], short, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the prompt")
def test_a_long_prompt_loses_its_end_but_keeps_the_eos(folder: Path) -> None:
    prompt = "a red circle moves to the left slowly"
    assert torch.equal(
        load_text_encoder(folder, text_len=5).encode([prompt]), expected(folder, [prompt], 5)
    )
    ids, count = Tokenizer((folder / "tokenizer.json").read_bytes(), "it")(prompt, 5)
    assert (ids.tolist(), count) == ([[3, 4, 5, 6, 1]], 5)


def test_white_space_and_entities_are_cleaned(folder: Path) -> None:
    assert clean("  a red\n\tcircle &amp;amp; a\u00a0circle ") == "a red circle & a circle"
    encoder = load_text_encoder(folder, text_len=TEXT_LEN)
    context = encoder.encode([" a\nred  circle &amp; the", "a red circle & the"])
    assert torch.equal(context[0], context[1])


def test_dtype_and_no_gradient(folder: Path) -> None:
    context = load_text_encoder(folder, dtype=torch.bfloat16, text_len=TEXT_LEN).encode(
        ["a circle"]
    )
    assert (
        context.dtype == torch.bfloat16 and not context.requires_grad and not context.is_inference()
    )


# ---- layouts


def test_every_layout_gives_the_same_context(folder: Path, state: State, tmp_path: Path) -> None:
    right = expected(folder, PROMPTS)
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    save_file(state, tmp_path / "umt5_xxl.safetensors")
    save_file(
        state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()},
        tmp_path / "tied.safetensors",
    )
    torch.save(
        {wan_name(name): tensor for name, tensor in state.items()},
        tmp_path / "models_t5_umt5-xxl-enc.pth",
    )
    whole = state | {
        "decoder.final_layer_norm.weight": torch.zeros(1),
        "lm_head.weight": torch.zeros(1),
    }
    torch.save(whole, tmp_path / "pytorch_model.bin")
    for name in (
        "umt5_xxl.safetensors",
        "tied.safetensors",
        "models_t5_umt5-xxl-enc.pth",
        "pytorch_model.bin",
    ):
        # These files do not say how far positions reach, which prompts of at most 5 tokens do not
        # feel.
        context = load_text_encoder(tmp_path / name, text_len=TEXT_LEN).encode(PROMPTS)
        assert torch.equal(context, right), name


@pytest.mark.filterwarnings("ignore:the prompt")
def test_the_reach_of_positions_comes_from_config_json(
    folder: Path, state: State, tmp_path: Path
) -> None:
    prompt = " ".join(WORDS * 9)
    right = expected(folder, [prompt], 80)
    assert torch.equal(load_text_encoder(folder, text_len=80).encode([prompt]), right)
    save_file(state, tmp_path / "umt5.safetensors")
    alone = load_text_encoder(tmp_path / "umt5.safetensors", folder, text_len=80)
    assert not torch.equal(alone.encode([prompt]), right)


@pytest.mark.parametrize("naming", [str, wan_name])
def test_scaled_fp8_is_multiplied_out(naming, folder: Path, state: State, tmp_path: Path) -> None:
    stored, right = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, dict(state)
    for name, weight in state.items():
        stored[naming(name)] = weight.to(torch.bfloat16)
        right[name] = weight.to(torch.bfloat16)
        if re.search(r"SelfAttention\.[qkvo]|DenseReluDense", name):
            scale = weight.abs().max() / 448
            stored[naming(name)] = (weight / scale).to(torch.float8_e4m3fn)
            stored[naming(name).replace(".weight", ".scale_weight")] = scale
            right[name] = (stored[naming(name)].to(torch.bfloat16) * scale).to(torch.bfloat16)
    save_file(stored, tmp_path / "scaled.safetensors")
    save_file(right, tmp_path / "right.safetensors")
    scaled, plain = (
        load_text_encoder(tmp_path / f"{name}.safetensors", folder, text_len=TEXT_LEN).encode(
            PROMPTS
        )
        for name in ("scaled", "right")
    )
    assert scaled.dtype == torch.bfloat16
    assert torch.equal(scaled, plain)


def fp8_state(state: State, scale_name: str, shape: str = "number") -> tuple[State, State]:
    """Return an encoder in fp8 with scales of this name, and the same multiplied out."""
    stored, right = {}, {}
    for name, weight in state.items():
        stored[name] = right[name] = weight.to(torch.bfloat16)
        if re.search(r"SelfAttention\.[qkvo]|DenseReluDense", name):
            rows = weight.abs().amax(1, keepdim=True) / 448
            scale = {
                "number": rows.max(),
                "one": rows.max()[None],
                "rows": rows[:, 0],
                "column": rows,
            }[shape]
            by_row = scale if scale.numel() == 1 else scale.reshape(-1, 1)
            stored[name] = (weight / by_row).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + scale_name] = scale
            right[name] = (stored[name].float() * by_row).to(torch.bfloat16)
    return stored, right


def quantised_as(stored: State, text: bytes) -> State:
    """Add ComfyUI's note of the format beside each scaled weight."""
    notes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    names = [name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn]
    return stored | {name.removesuffix("weight") + "comfy_quant": notes.clone() for name in names}


@pytest.mark.parametrize("shape", ["number", "one", "rows", "column"])
@pytest.mark.parametrize(
    "scale_name", ["scale_weight", "weight_scale", "weight_scale with comfy_quant"]
)
def test_fp8_scales_of_every_name_and_shape_are_used(
    scale_name, shape, folder, state, tmp_path
) -> None:
    stored, right = fp8_state(state, scale_name.split()[0], shape)
    if "comfy_quant" in scale_name:
        stored = quantised_as(stored, b'{"format": "float8_e4m3fn"}')
        stored["encoder.block.0.layer.0.SelfAttention.q.input_scale"] = torch.tensor(
            1.0
        )  # of activations
    save_file(stored, tmp_path / "scaled.safetensors")
    save_file(right, tmp_path / "right.safetensors")
    scaled, plain = (
        load_text_encoder(tmp_path / f"{name}.safetensors", folder, text_len=TEXT_LEN).encode(
            PROMPTS
        )
        for name in ("scaled", "right")
    )
    assert torch.equal(scaled, plain)


Q = "encoder.block.0.layer.0.SelfAttention.q."
UNSCALED = {
    "an unknown name": (lambda stored: stored | {Q + "scale": torch.ones(())}, "scale"),
    "a scale without its weight": (
        lambda stored: stored | {"encoder.x.scale_weight": torch.ones(())},
        "encoder.x",
    ),
    "two scales": (lambda stored: stored | {Q + "weight_scale": torch.ones(())}, "two scales"),
    "one lacks": (
        lambda stored: {name: one for name, one in stored.items() if name != Q + "scale_weight"},
        "no scale",
    ),
    "in blocks": (lambda stored: stored | {Q + "scale_weight": torch.ones(2, 3)}, r"\[2, 3\]"),
    "a format in blocks": (lambda stored: quantised_as(stored, b'{"format": "nvfp4"}'), "nvfp4"),
    "a format of none": (lambda stored: quantised_as(stored, b"\xff"), "comfy_quant"),
    "a second scale": (
        lambda stored: stored | {Q + "weight_scale_2": torch.ones(())},
        "weight_scale_2",
    ),
}


@pytest.mark.parametrize("case", UNSCALED)
def test_scales_that_would_be_left_out_are_refused(case: str, folder, state, tmp_path) -> None:
    change, keyword = UNSCALED[case]
    path = tmp_path / "umt5.safetensors"
    save_file(change(fp8_state(state, "scale_weight")[0]), path)
    with pytest.raises(ValueError, match=keyword) as error:
        load_text_encoder(path, folder, text_len=TEXT_LEN).encode(PROMPTS)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_a_prompt_that_is_cut_is_said_each_time(
    kind: str, folder: Path, spiece: bytes, tmp_path: Path
) -> None:
    place = folder
    if kind == "sentencepiece":
        place = tmp_path / "spiece.model"
        place.write_bytes(spiece)
    long = "the red circle moves to the left slowly " * 3
    for _ in range(2):  # encoded, then from the cache
        encoder = load_text_encoder(folder, place, text_len=TEXT_LEN, cache_dir=tmp_path / "cache")
        with pytest.warns(UserWarning, match=f"reads {TEXT_LEN}"):
            encoder.encode([long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["a red"])


def test_a_prompt_that_just_fits_is_not_cut(folder: Path) -> None:
    encoder = load_text_encoder(folder, text_len=TEXT_LEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([" ".join(["red"] * (TEXT_LEN - 1))])
    with pytest.warns(UserWarning, match=f"{TEXT_LEN + 1} tokens"):
        encoder.encode([" ".join(["red"] * TEXT_LEN)])


def test_plain_fp8_runs_in_bf16(folder: Path, state: State, tmp_path: Path) -> None:
    low = {name: weight.to(torch.float8_e4m3fn) for name, weight in state.items()}
    save_file(low, tmp_path / "a.safetensors")
    save_file(
        {name: weight.to(torch.bfloat16) for name, weight in low.items()},
        tmp_path / "b.safetensors",
    )
    first, second = (
        load_text_encoder(tmp_path / name, folder, text_len=TEXT_LEN).encode(PROMPTS)
        for name in ("a.safetensors", "b.safetensors")
    )
    assert torch.equal(first, second)


# ---- what is no encoder


def test_folders_that_are_no_encoder(folder: Path, tmp_path: Path) -> None:
    assert "config.json" in error(tmp_path)
    for content, text in (
        ('{"model_type": "llama"}', "llama"),
        ("{", "not readable"),
        ("[]", "not readable"),
    ):
        (tmp_path / "config.json").write_text(content)
        assert text in error(tmp_path)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    assert "folder" in error(tmp_path)


def test_files_that_are_no_umt5(folder: Path, state: State, tmp_path: Path) -> None:
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    query = "encoder.block.1.layer.0.SelfAttention.q.weight"
    gate = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    cases = {
        "video transformer": {
            "blocks.0.self_attn.q.weight": torch.zeros(1),
        },
        "known kind": {"a": torch.zeros(1)},
        "one position table": {k: v for k, v in state.items() if k != bias},
        gate: {k: v for k, v in state.items() if k != gate},
        f"lacks {query}": {k: v for k, v in state.items() if k != query},
        f"{query} of [2, 64]": state | {query: torch.zeros(2, 64)},
        "encoder.extra": state | {"encoder.extra": torch.zeros(1)},
        bias: state | {bias: torch.zeros(32, 0)},
        "torch.bfloat16": state | {"spiece_model": torch.zeros(4, dtype=torch.bfloat16)},
        "torch.int8": state | {query: torch.zeros(48, 64, dtype=torch.int8)},
    }
    for number, (text, content) in enumerate(cases.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file(content, path)
        assert text in error(path, folder) and str(path) in error(path, folder)


def test_wrong_arguments(folder: Path) -> None:
    assert "text_len 0" in error(folder, text_len=0)
    assert "torch.int8" in error(folder, dtype=torch.int8)
    encoder = load_text_encoder(folder, text_len=TEXT_LEN)
    for prompts in ("a red circle", [], [1]):
        with pytest.raises(ValueError, match="list"):
            encoder.encode(prompts)


def test_a_prompt_reaches_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """`generate --text-encoder` samples as the model does with the encoded prompt."""
    config = WanConfig(
        dim=128, num_heads=1, ffn_dim=128, num_layers=1, text_dim=64, text_len=TEXT_LEN
    )
    sizes = {"config": json.dumps({"transformer": {"text_len": TEXT_LEN}})}
    network = tiny_network(config)
    save_file(network.model.state_dict(), tmp_path / "model.safetensors", metadata=sizes)
    save_file(WanVAE(4).state_dict(), tmp_path / "vae.safetensors")

    def run(prompt: str) -> Tensor:
        files = [
            "--model",
            str(tmp_path / "model.safetensors"),
            "--vae",
            str(tmp_path / "vae.safetensors"),
        ]
        prompt_from = [
            "--text-encoder",
            str(folder),
            "--context-cache",
            str(tmp_path / "cache"),
            "--prompt",
            prompt,
        ]
        what = [
            "--preset",
            "self-forcing",
            "--frames",
            "9",
            "--size",
            "32x32",
            "--save-latents",
            "--overwrite",
        ]
        assert (
            main(["generate", *files, *prompt_from, *what, "--out", str(tmp_path / "a.mp4")]) == 0
        )
        return read_latents(tmp_path / "a.latents.safetensors")[0]

    context = load_text_encoder(folder, text_len=TEXT_LEN).encode(PROMPTS[:1])
    plan = RunPlan(get_preset("self-forcing"), 3, 4, 4)
    assert torch.equal(run(PROMPTS[0]), torch.cat(list(sample(network, context, plan)), 2))
    assert not torch.equal(run(PROMPTS[1]), run(PROMPTS[0]))
    assert len(list((tmp_path / "cache").iterdir())) == 2
