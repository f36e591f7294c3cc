"""Published files, written here with random weights in their exact key layouts, load bit for bit."""

import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.checkpoint import (
    describe,
    inspect,
    load_transformer,
    load_vae_state,
    save_safetensors,
)
from autorefiner.refiner.wan.identify import NAME_HINTS, PUBLISHED_KEY
from autorefiner.refiner.wan.transformer import WAN_14B, WanConfig, WanTransformer
from autorefiner.refiner.wan.weight_file import open_weights

CONFIG = WanConfig(dim=256, num_heads=2, ffn_dim=256, num_layers=2, text_dim=64)
FSDP = "model._fsdp_wrapped_module."
State = dict[str, Tensor]


def make_state(seed: int = 0, config: WanConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> State:
    with torch.device("meta"):
        shapes = WanTransformer(config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in shapes.items()}


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def wrapped(state: State) -> State:
    """As torch.compile and activation checkpointing of single blocks leave the names."""
    return {
        "model._orig_mod." + re.sub(r"^(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", name): tensor
        for name, tensor in state.items()
    }


def diffusers_name(name: str) -> str:
    """The naming map the other way round, written down apart from the loader's."""
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
    name = name.replace("self_attn", "attn1").replace("cross_attn", "attn2").replace("norm3", "norm2")
    name = name.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
    return name.replace("modulation", "scale_shift_table")


def in_diffusers(state: State) -> State:
    return {diffusers_name(name): tensor for name, tensor in state.items()}


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


# fmt: off
OTHER = {"model.blocks.0.self_attn.q.weight": torch.zeros(2, 2)}  # a second model in the file, not to be taken
LAYOUTS = {
    # name: (file, what is in it, top key, preset)
    "self-forcing": ("checkpoints/self_forcing_dmd.pt", lambda s: {
        "generator": OTHER, "generator_ema": prefixed(s, "model."), "critic": OTHER}, "generator_ema", "self-forcing"),
    "ode init, top key model": ("ode_init.pt", lambda s: {"model": prefixed(s, "model.")}, "model", None),
    "causvid": ("autoregressive_checkpoint/model.pt", lambda s: {
        "generator": prefixed(s, "model."), "critic": OTHER}, "generator", "causvid"),
    "longlive base": ("models/longlive_base.pt", lambda s: {"generator": prefixed(s, "model.")}, "generator", "longlive"),
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
    "wrapped flat": ("model_400.safetensors", lambda s: prefixed(s, "model."), "flat", None),
    "plain": ("wan.safetensors", dict, "flat", None),
    "comfyui checkpoint": ("wan.safetensors", lambda s: prefixed(s, "model.diffusion_model."), "flat", None),
    "comfyui model": ("wan.safetensors", lambda s: prefixed(s, "diffusion_model."), "flat", None),
    "net.": ("wan.safetensors", lambda s: prefixed(s, "net."), "flat", None),
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
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert info == inspect(path)
    assert (info.kind, info.top_key, info.preset, info.config) == ("transformer", top_key, preset, CONFIG)
    assert (info.tensors, info.dtypes) == (len(state), ("bfloat16",))
    assert info.nbytes == sum(tensor.nbytes for tensor in state.values())


def test_legacy_torch_files_load_too(state: State, tmp_path: Path) -> None:
    torch.save({"generator": prefixed(state, "model.")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert equal_bits(load_transformer(tmp_path / "old.pt")[0].state_dict(), state)


def test_parameters_in_a_file_and_a_misleading_suffix_do_not_matter(state: State, tmp_path: Path) -> None:
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    torch.save(parameters, tmp_path / "wan.safetensors")
    assert equal_bits(load_transformer(tmp_path / "wan.safetensors")[0].state_dict(), state)


def test_diffusers_norm2_is_our_norm3(state: State) -> None:
    assert torch.equal(in_diffusers(state)["blocks.1.norm2.weight"], state["blocks.1.norm3.weight"])
    assert not any("norm3" in name for name in in_diffusers(state))


def test_what_was_removed_is_told(state: State, tmp_path: Path) -> None:
    info = inspect(write(tmp_path / "a.pt", {"generator_ema": prefixed(state, FSDP), "critic": OTHER, "step": 600}))
    assert (info.prefix, info.infixes) == ("model.", ("_fsdp_wrapped_module.",))
    assert info.other_keys == ("critic", "step")
    lines = describe(info).splitlines()
    assert "removed   model. _fsdp_wrapped_module." in lines
    assert "weights   generator_ema (also in it: critic, step)" in lines
    assert any(line.startswith("sizes     width 256, 2 layers, 2 heads, feed-forward 256") for line in lines)
    assert f"tensors   {len(state)}, bfloat16, 3.93 MB" in lines
    assert {line[9] for line in lines} == {" "}


# ---- which weights


def test_averaged_or_raw_weights_by_request(state: State, tmp_path: Path) -> None:
    raw = make_state(1)
    both = {"generator": prefixed(raw, "model."), "generator_ema": prefixed(state, "model.")}
    path = write(tmp_path / "a.pt", both)
    for weights, right in (("auto", state), ("ema", state), ("raw", raw)):
        assert equal_bits(load_transformer(path, weights=weights)[0].state_dict(), right)
    assert "weights 'best': use auto, ema or raw" in message(path, weights="best")


def test_a_name_known_to_use_raw_weights_is_followed_and_noted(state: State, tmp_path: Path) -> None:
    both = {"generator": prefixed(state, "model."), "generator_ema": prefixed(make_state(1), "model.")}
    info = inspect(write(tmp_path / "longlive_base.pt", both))
    assert info.top_key == "generator"
    assert "weights=ema takes generator_ema" in info.notes[0]


def test_weights_that_are_not_there(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {"generator": prefixed(state, "model."), "critic": OTHER})
    assert "has no ema weights, only generator, critic" in message(path, weights="ema")
    path = write(tmp_path / "b.pt", {"critic": OTHER, "fake_score": OTHER})
    assert "holds critic, fake_score, and none of generator_ema" in message(path)


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
    "config", ["{", "[]", '"x"', '{"transformer": 3}', '{"transformer": {"num_heads": "many"}}', "[" * 100_000]
)
def test_malformed_metadata_is_ignored(config: str, state: State, tmp_path: Path) -> None:
    info = inspect(write(tmp_path / "a.safetensors", state, {"config": config, "autorefiner": "{"}))
    assert info.config == CONFIG
    assert "metadata 'autorefiner' is not a JSON object: ignored" in info.notes


def test_impossible_heads_in_metadata(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", state, {"config": '{"transformer": {"num_heads": 3}}'})
    assert inspect(path).config is None
    assert "does not divide into 3 heads" in message(path)


def test_a_narrow_model_needs_its_heads_in_metadata(tmp_path: Path) -> None:
    config = WanConfig(dim=64, num_heads=2, ffn_dim=64, num_layers=1, text_dim=8)
    narrow = make_state(config=config)
    assert "metadata `config` must give num_heads" in message(write(tmp_path / "a.safetensors", narrow))
    path = write(tmp_path / "b.safetensors", narrow, {"config": '{"transformer": {"num_heads": 2}}'})
    assert load_transformer(path)[0].config == config


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            lambda s: {"generator_ema": prefixed(s, "model."), "generator": OTHER},
            "cannot tell Self-Forcing from Causal",
        ),
        (lambda s: {"generator_ema": prefixed(s, FSDP)}, "Causal-Forcing's frame-wise, 2-step, 1-step"),
        (lambda s: {"generator": prefixed(s, "model."), "critic": OTHER}, "cannot tell CausVid, LongLive"),
        (lambda s: prefixed(s, "model."), "the training wrapper's names"),
        (dict, "plain Wan2.1, which is not autoregressive"),
    ],
)
def test_keys_alone_never_decide_what_they_cannot(content, reason: str, state: State, tmp_path: Path) -> None:
    info = inspect(write(tmp_path / "x" / "y" / "model.pt", content(state)))
    assert info.preset is None
    assert reason in info.preset_reason and "pass --preset" in info.preset_reason


def test_a_name_is_only_a_hint(state: State, tmp_path: Path) -> None:
    folder = tmp_path / "LongLive"
    info = inspect(write(folder / "self_forcing.safetensors", state))
    assert info.preset == "self-forcing"
    assert info.preset_reason == "only the name 'self_forcing.safetensors' says so, a hint, pass --preset to be sure"
    info = inspect(write(folder / "a" / "krea.safetensors", state))
    assert info.preset is None and "not published at width 256" in info.preset_reason
    info = inspect(write(folder / "a" / "longvideo.pt", state))
    assert info.preset is None and "long-video" in info.preset_reason
    metadata = {"config": '{"transformer": {"causal_ar": true}}'}
    info = inspect(write(tmp_path / "x" / "y" / "model.safetensors", state, metadata))
    assert info.preset is None and "autoregressive but not how it is sampled" in info.preset_reason


def test_the_presets_named_here_exist() -> None:
    assert {preset for _, preset in NAME_HINTS if preset} | set(PUBLISHED_KEY) <= set(PRESETS)


def write_14b(path: Path, prefix: str) -> Path:
    """A 14B file of 28.6 GB that is only a header: the data is a hole."""
    with torch.device("meta"):
        shapes = WanTransformer(WAN_14B).state_dict()
    header, end = {}, 0
    for name, tensor in shapes.items():
        start, end = end, end + 2 * tensor.numel()
        header[prefix + name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    os.truncate(path, 8 + len(encoded) + end)
    return path


def test_krea_is_known_by_its_size_and_names_without_reading_data(tmp_path: Path) -> None:
    info = inspect(write_14b(tmp_path / "14b_400.safetensors", "model."))
    assert (info.config, info.tensors, info.nbytes) == (WAN_14B, 1095, 28_576_983_168)
    assert (info.preset, "only Krea's" in info.preset_reason) == ("krea-14b", True)
    assert "28.58 GB" in describe(info)
    plain = inspect(write_14b(tmp_path / "wan2.1_t2v_14B.safetensors", ""))
    assert plain.preset is None and "not autoregressive" in plain.preset_reason
    named = inspect(write_14b(tmp_path / "self_forcing_14b.safetensors", ""))
    assert named.preset is None and "not published at width 5120" in named.preset_reason


# ---- LoRA

LINEAR = re.compile(r"(blocks\.\d+\.(?:self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02]))\.weight")


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


@pytest.mark.parametrize("wrap", [dict, lambda lora: {"generator_lora": lora, "critic_lora": lora, "step": 1}])
def test_longlive_is_base_plus_lora(wrap, state: State, tmp_path: Path) -> None:
    base = write(tmp_path / "base.pt", {"generator": prefixed(state, "model.")})
    lora = make_lora(state, 256)
    path = write(tmp_path / "lora.pt", wrap(lora))
    model, info = load_transformer(base, lora=path)
    assert equal_bits(model.state_dict(), merged(state, lora))
    assert (info.merged_lora, info.preset) == (20, "longlive")
    assert "LoRA      merged into 20 weights" in describe(info)
    assert inspect(path).kind == "lora" and inspect(path).notes == ("rank 256 on 20 linear layers",)


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
        "has blocks.0.diff, which is no part of a LoRA pair": lora | {"blocks.0.diff": torch.zeros(1)},
        "is not a LoRA but a file of kind 'transformer'": state,
    }
    for number, (text, content) in enumerate(cases.items()):
        path = write(tmp_path / f"{number}.safetensors", content)
        with pytest.raises(ValueError) as raised:
            load_transformer(base, lora=path)
        assert text in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_stored_dtype_is_kept(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert equal_bits(load_transformer(write(tmp_path / "a.safetensors", stored))[0].state_dict(), stored)


def test_another_dtype_by_request(state: State, tmp_path: Path) -> None:
    model, info = load_transformer(write(tmp_path / "a.pt", state), dtype=torch.float32)
    assert equal_bits(model.state_dict(), {name: tensor.float() for name, tensor in state.items()})
    assert info.dtypes == ("bfloat16",)
    with pytest.raises(ValueError, match="cannot run a network"):
        load_transformer(tmp_path / "a.pt", dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(("most", "runs"), [(torch.float8_e4m3fn, torch.bfloat16), (torch.float16, torch.float16)])
def test_mixed_files_run_in_the_dtype_of_most_bytes_and_fp8_in_bf16(most, runs, state: State, tmp_path: Path) -> None:
    stored = {name: tensor.to(most) if tensor.ndim == 2 else tensor.float() for name, tensor in state.items()}
    path = write(tmp_path / "a.safetensors", stored)
    model, info = load_transformer(path)
    assert equal_bits(model.state_dict(), {name: tensor.to(runs) for name, tensor in stored.items()})
    assert info.dtypes == (str(most).removeprefix("torch."), "float32")


def test_quantised_files_are_refused(state: State, tmp_path: Path) -> None:
    scaled = state | {"scaled_fp8": torch.zeros(2), "blocks.0.ffn.0.scale_weight": torch.ones(1)}
    assert "scaled, quantised weights (scaled_fp8)" in message(write(tmp_path / "a.safetensors", scaled))
    whole = state | {"blocks.0.ffn.0.weight": torch.zeros(256, 256, dtype=torch.int8)}
    path = write(tmp_path / "b.safetensors", whole)
    assert "blocks.0.ffn.0.weight in torch.int8" in message(path)
    assert "blocks.0.ffn.0.weight in torch.int8" in message(path, dtype=torch.float32)


def test_changing_loaded_weights_leaves_the_file_alone(state: State, tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        path = write(tmp_path / name, state)
        before = path.read_bytes()
        model, _ = load_transformer(path)
        for parameter in model.parameters():
            parameter.zero_()
        assert path.read_bytes() == before


# ---- files that are something else


class Malicious:
    """Its unpickling would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_would_run_code_is_refused(state: State, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"generator": prefixed(state, "model."), "config": Malicious(mark)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Malicious(mark), protocol=2))
    (tmp_path / "c.pth").write_bytes(pickle.dumps({"generator": 1}, protocol=2))
    assert ".system) and could run code when opened, so it is refused" in message(tmp_path / "a.pt")
    assert "so it is refused" in message(tmp_path / "b.pt")
    assert "so it is refused" in message(tmp_path / "c.pth")
    assert not mark.exists()
    pickle.loads((tmp_path / "b.pt").read_bytes())
    assert mark.exists()  # the file does what it says


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.pt", b"", "is empty (0 bytes)"),
        ("a.safetensors", b"", "is empty (0 bytes)"),
        ("a.pt", b"<!DOCTYPE html><html>404</html>" * 9, "is a text file"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        ("a.gguf", b"GGUF\x03\0\0\0" * 9, "is a GGUF file"),
        ("a.pt", bytes(range(256)), "is neither a .safetensors nor a torch .pt"),
        ("a.safetensors", b"\xff" * 8 + b'{"a":1}', "is damaged or cut short"),
    ],
)
def test_files_that_are_no_weights(name: str, content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert text in message(tmp_path / name)


@pytest.mark.parametrize("part", [0.999, 0.5, 0.001])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_files_cut_short(kind: str, part: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        write(path, state)
    os.truncate(path, int(path.stat().st_size * part))
    assert "is damaged or cut short" in message(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "none.pt")
    assert "pass a .safetensors or .pt file" in message(tmp_path)
    write(tmp_path / "sub" / "some.pt", OTHER)
    assert f"pass one of its files ({Path('sub') / 'some.pt'})" in message(tmp_path)


def test_torch_files_without_a_model(tmp_path: Path) -> None:
    assert "holds a list and not a state dict" in message(write(tmp_path / "a.pt", [1, 2]))
    assert "holds no tensors, only step, optimizer" in message(write(tmp_path / "b.pt", {"step": 1, "optimizer": {}}))
    assert "is no file of a known kind" in message(write(tmp_path / "c.pt", {"a": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("lora", ["diffusion_model.blocks.0.ffn.0.lora_A.weight"]),
        ("refiner", ["autorefiner.blocks.0.ffn.0.lora_A.weight", "autorefiner.blocks.0.ffn.0.lora_B.weight"]),
        ("vae", ["decoder.head.0.gamma"]),
        ("vae", ["first_stage_model.decoder.head.0.gamma"]),
        ("text encoder", ["encoder.block.0.layer.0.SelfAttention.q.weight"]),
        ("text encoder", ["blocks.0.pos_embedding.embedding.weight"]),
    ],
)
def test_other_kinds_are_named(kind: str, names: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {name: torch.zeros(2, 2) for name in names})
    info = inspect(path)
    assert (info.kind, info.config, info.preset, info.preset_reason) == (kind, None, None, f"a {kind} file has none")
    article = "a LoRA" if kind == "lora" else f"a {kind}"
    assert f"is {article}: pass it as the" in message(path)


def test_other_video_models_are_named(state: State, tmp_path: Path) -> None:
    def with_channels(inside: int, outside: int) -> State:
        head = torch.zeros(outside * 4, 256)
        patch = torch.zeros(256, inside, 1, 2, 2)
        return state | {"patch_embedding.weight": patch, "head.head.weight": head, "head.head.bias": head[:, 0]}

    cases = {
        "Wan2.1 image-to-video": with_channels(36, 16) | {"img_emb.proj.0.weight": torch.zeros(2)},
        "Wan2.2 5B (48 latent channels)": with_channels(48, 48),
        "Wan2.1 VACE": state | {"vace_blocks.0.self_attn.q.weight": torch.zeros(2)},
        "a model of 32 input and 16 output channels": with_channels(32, 16),
    }
    for number, (text, content) in enumerate(cases.items()):
        path = write(tmp_path / f"self_forcing_{number}.safetensors", content)
        assert f"looks like {text}" in message(path)
        assert inspect(path).preset is None and text in inspect(path).preset_reason


def test_incomplete_models(state: State, tmp_path: Path) -> None:
    def without(*parts: str) -> State:
        return {name: tensor for name, tensor in state.items() if not any(part in name for part in parts)}

    cases = {
        "lacks 8 tensors (blocks.0.cross_attn.q.weight, blocks.0.cross_attn.q.bias, blocks.0.cross_attn.k.weight, ...)": (
            without("blocks.0.cross_attn.q", "blocks.0.cross_attn.k", "blocks.0.cross_attn.v", "blocks.0.cross_attn.o")
        ),
        "lacks head.modulation, which tells the model's size": without("head.modulation"),
        "has a head.modulation of shape [256], which should have 3 axes": state | {"head.modulation": torch.zeros(256)},
        "has 1 tensors that Wan2.1 has not (blocks.0.extra)": state | {"blocks.0.extra": torch.zeros(1)},
        "has a blocks.0.ffn.2.bias of [7], which should be [256]": state | {"blocks.0.ffn.2.bias": torch.zeros(7)},
    }
    for number, (text, content) in enumerate(cases.items()):
        path = write(tmp_path / f"{number}.safetensors", content)
        assert text in message(path)
        assert inspect(path).kind == "transformer"


def test_names_that_collide_once_cleaned(state: State, tmp_path: Path) -> None:
    double = prefixed(state, "model.") | {FSDP + "head.modulation": torch.zeros(1)}
    assert "two tensors have the same name" in message(write(tmp_path / "a.pt", double))
    double = prefixed(state, "model.") | {"head.modulation": torch.zeros(1)}
    assert "two tensors have the same name" in message(write(tmp_path / "b.pt", double))


# ---- shards


def write_shards(folder: Path, state: State, suffix: str = "safetensors") -> Path:
    stem = "diffusion_pytorch_model" if suffix == "safetensors" else "pytorch_model"
    where = {name: f"{stem}-0000{1 + number % 2}-of-00002.{suffix}" for number, name in enumerate(state)}
    for shard in sorted(set(where.values())):
        write(folder / shard, {name: tensor for name, tensor in state.items() if where[name] == shard})
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_of_shards(suffix: str, state: State, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, in_diffusers(state), suffix)
    model, info = load_transformer(folder)
    assert equal_bits(model.state_dict(), state)
    assert (info.container, info.naming, info.tensors) == ("2 shards", "diffusers", len(state))


def test_damaged_folders_of_shards(state: State, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, state)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    right = index.read_text()
    names = json.loads(right)["weight_map"]
    shard = names["head.head.bias"]
    for text, content in {
        "is not an index of shards": "[]",
        "names a shard outside its folder (../x.safetensors)": json.dumps({"weight_map": {"a": "../x.safetensors"}}),
        "lacks 1 tensors of its index (a)": json.dumps({"weight_map": names | {"a": shard}}),
    }.items():
        index.write_text(content)
        assert text in message(folder)
    index.write_text(right)
    (folder / shard).unlink()
    assert f"lacks {shard}, one of its 2 shards" in message(folder)


def test_a_folder_with_one_file_of_a_known_name(state: State, tmp_path: Path) -> None:
    write(tmp_path / "diffusion_pytorch_model.safetensors", in_diffusers(state))
    assert equal_bits(load_transformer(tmp_path)[0].state_dict(), state)


# ---- VAE

VAE_FILE = Path(__file__).parents[1] / "golden" / "vae_weights.safetensors"


@pytest.mark.parametrize(("name", "prefix"), [("a.pth", ""), ("b.safetensors", "vae."), ("c.pt", "first_stage_model.")])
def test_vae_files(name: str, prefix: str, tmp_path: Path) -> None:
    right = load_file(VAE_FILE)
    found = load_vae_state(write(tmp_path / name, prefixed(right, prefix)))
    assert set(found) == set(right) and all(torch.equal(found[key], right[key]) for key in right)


def test_files_that_are_no_wan_vae(state: State, tmp_path: Path) -> None:
    whole = load_file(VAE_FILE)
    cases = {
        "is a video transformer: pass it as the model; the VAE is Wan2.1_VAE.pth": state,
        "is a VAE in diffusers' names": {"decoder.conv_in.weight": torch.zeros(1)},
        "is a VAE of 48 latent channels": whole | {"conv2.weight": torch.zeros(48, 48, 1, 1, 1)},
        "is no file of a known kind": {"a": torch.zeros(1)},
    }
    for number, (text, content) in enumerate(cases.items()):
        path = write(tmp_path / f"{number}.safetensors", content)
        with pytest.raises(ValueError) as raised:
            load_vae_state(path)
        assert text in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


# ---- saving


def test_saving_is_complete_or_absent(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"config": '{"transformer": {"causal_ar": true}}'}
    save_safetensors(path, state, metadata)
    model, info = load_transformer(path)
    assert equal_bits(model.state_dict(), state) and info.metadata == metadata
    before = path.read_bytes()

    def full_disk(*_) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_safetensors(path, make_state(1), {})
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_loaded_pt_can_be_saved_over_and_again(state: State, tmp_path: Path) -> None:
    model, _ = load_transformer(write(tmp_path / "a.pt", {"generator_ema": prefixed(state, FSDP), "generator": OTHER}))
    save_safetensors(tmp_path / "a.pt", model.state_dict(), {})
    assert equal_bits(load_transformer(tmp_path / "a.pt")[0].state_dict(), state)
    with safe_open(tmp_path / "a.pt", framework="pt") as file:
        assert set(file.keys()) == set(state)


def test_transposed_weights_save_and_load(tmp_path: Path) -> None:
    wide = torch.arange(6.0).view(2, 3)
    save_safetensors(tmp_path / "a.safetensors", {"a": wide.t()}, {})
    file = open_weights(tmp_path / "a.safetensors")
    assert file.groups["flat"]["a"].is_meta
    assert torch.equal(file.read("flat", "a"), wide.t())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata 'config' is a dict, but the format holds strings"):
        save_safetensors(tmp_path / "a.safetensors", {}, {"config": {}})
    with pytest.raises(ValueError, match="is not a folder: make it before saving"):
        save_safetensors(tmp_path / "none" / "a.safetensors", {}, {})
