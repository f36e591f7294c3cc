"""LoRA files, of LongLive and others, merge into the base weights as the arithmetic says."""

import json
from pathlib import Path

import pytest
import torch
from lora_files import LINEAR, make_lora, merged
from published import State, diffusers_name, equal_bits, make_state, prefixed, write
from safetensors.torch import save_file

from autorefiner.refiner.cli import main
from autorefiner.refiner.wan.checkpoint import describe, inspect, load_transformer, read_transformer
from autorefiner.refiner.wan.lora import LoraFile, read_lora


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


OTHER = {"a": torch.zeros(1)}  # stored beside the LoRA in its file


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda lora: {"generator_lora": lora, "critic_lora": OTHER, "generator": OTHER, "step": 1},
    ],
)
def test_longlive_is_base_plus_lora(wrap, state: State, tmp_path: Path) -> None:
    folder = tmp_path / "x" / "y"  # the folder of the test itself says LongLive
    base = write(folder / "base.pt", {"generator": prefixed(state, "model.")})
    lora = make_lora(state, 256)
    path = write(folder / "lora.pt", wrap(lora))
    model, info = load_transformer(base, lora=path)
    assert equal_bits(model.state_dict(), merged(state, lora))
    assert (info.merged_lora, info.preset, info.likely) == (20, None, ("longlive", "opsd-v"))
    assert "rank 256" in info.preset_reason
    assert "merged into 20" in describe(info)
    assert inspect(base, lora=[LoraFile(path)]).likely == info.likely
    assert inspect(base, lora=[LoraFile(path, 0.0)]).likely == inspect(base).likely
    named = write(folder / "longlive_base.pt", {"generator": prefixed(state, "model.")})
    assert inspect(named, lora=[LoraFile(path)]).preset == "longlive"


@pytest.mark.parametrize(
    ("name", "preset"),
    [("opsdv_self_forcing_lora.pt", "opsd-v"), ("cmgrpo_raven_lora.safetensors", "raven")],
)
def test_a_published_lora_decides_how_its_base_is_sampled(
    name, preset, state: State, tmp_path: Path
) -> None:
    base = write(tmp_path / "self_forcing_dmd.pt", {"generator_ema": prefixed(state, "model.")})
    lora = write(tmp_path / name, make_lora(state, 4))
    assert inspect(base).preset == "self-forcing"
    assert (
        load_transformer(base, lora=lora)[1].preset
        == inspect(base, lora=[LoraFile(lora)]).preset
        == preset
    )


def test_a_lora_file_is_recognised(state: State, tmp_path: Path) -> None:
    info = inspect(
        write(tmp_path / "lora.pt", {"generator_lora": make_lora(state, 8), "critic_lora": OTHER})
    )
    assert (info.kind, info.top_key) == ("lora", "generator_lora")
    assert info.notes == ("rank 8 on 20 linear layers", "scale 1")


def test_a_lora_of_zeros_changes_nothing(state: State, tmp_path: Path) -> None:
    base = write(tmp_path / "base.pt", {"generator": prefixed(state, "model.")})
    lora = {name: torch.zeros_like(tensor) for name, tensor in make_lora(state, 4).items()}
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
        "model.base_model.model.{}.lora_{}.default.weight",
        "model.module.{}.lora_{}.hypernoise_adapter.weight",
    ],
)
def test_other_lora_names(form: str, state: State, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state)
    path = write(tmp_path / "lora.safetensors", make_lora(state, 4, form))
    model, _ = load_transformer(base, lora=path, dtype=torch.float32)
    whole = {name: tensor.float() for name, tensor in state.items()}
    assert equal_bits(model.state_dict(), merged(whole, make_lora(state, 4)))


def in_diffusers(module: str) -> str:
    """Return diffusers' name of a layer."""
    return diffusers_name(module + ".weight").removesuffix(".weight")


def underscored(module: str) -> str:
    return module.replace(".", "_")


def mixed(module: str) -> str:
    """Replace only the first dot, before the block's number."""
    return module.replace(".", "_", 1)


# Prefix, spelling of a module, names of down and up, and whether alpha is a tensor beside them.
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
A_B = (".lora_A.weight", ".lora_B.weight")
A_B_DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
OLD_DOWN_UP = (".lora.down.weight", ".lora.up.weight")
STYLES = {
    "kohya": ("lora_unet_", underscored, *DOWN_UP, True),
    "musubi": ("lora_unet_", mixed, *DOWN_UP, True),
    "kohya of diffusers": ("lora_unet_", lambda m: underscored(in_diffusers(m)), *DOWN_UP, True),
    "VideoX-Fun": ("lora_unet__", underscored, *DOWN_UP, True),
    "diffusers": ("transformer.", in_diffusers, *A_B, False),
    "PEFT of diffusers": ("base_model.model.", in_diffusers, *A_B_DEFAULT, False),
    "older diffusers": ("transformer.", in_diffusers, *OLD_DOWN_UP, False),
}


@pytest.mark.parametrize("style", STYLES)
def test_the_names_of_other_trainers(style: str, state: State, tmp_path: Path) -> None:
    prefix, spelled, down, up, alpha = STYLES[style]
    lora, renamed = make_lora(state, 4), {}
    for name, tensor in lora.items():
        module, end = name.removeprefix("base_model.model.").split(".lora_")
        renamed[prefix + spelled(module) + (down if end == "A.weight" else up)] = tensor
        if alpha:
            renamed[prefix + spelled(module) + ".alpha"] = torch.tensor(2.0)
    path = write(tmp_path / "lora.safetensors", renamed)
    model, info = load_transformer(write(tmp_path / "base.safetensors", state), lora=path)
    assert equal_bits(model.state_dict(), merged(state, lora, 0.5 if alpha else 1.0))
    assert info.merged_lora == 20
    assert "rank 4 on 20 linear layers" in inspect(path).notes


def test_layers_outside_the_blocks_have_names_with_underscores_too(
    state: State, tmp_path: Path
) -> None:
    """VideoX-Fun's reward LoRAs have such names."""
    modules = ("head.head", "text_embedding.0", "time_embedding.2", "time_projection.1")
    lora = {}
    for module in modules:
        rows, columns = state[module + ".weight"].shape
        name = "lora_unet__" + underscored(module)
        lora |= {
            f"{name}.lora_down.weight": torch.ones(4, columns),
            f"{name}.lora_up.weight": torch.ones(rows, 4),
        }
    model, info = load_transformer(
        write(tmp_path / "base.safetensors", state), lora=write(tmp_path / "lora.safetensors", lora)
    )
    assert info.merged_lora == 4
    for module in modules:
        changed = (state[module + ".weight"].float() + 4).to(torch.bfloat16)
        assert torch.equal(model.state_dict()[module + ".weight"], changed)


@pytest.mark.parametrize(
    "groups", [("generator_ema",), ("generator_ema", "generator_lora"), ("generator_lora",)]
)
def test_a_lora_is_read_where_only_its_average_is_there(
    groups, state: State, tmp_path: Path
) -> None:
    lora = make_lora(state, 4)
    averaged = make_lora(state, 4, "model.base_model.model.{}.lora_{}.default.weight")
    if len(groups) > 1:
        averaged = {name: 2 * tensor for name, tensor in averaged.items()}
    content = {"generator_ema": averaged, "generator_lora": lora, "critic_lora": OTHER}
    path = write(tmp_path / "lora.pt", {name: content[name] for name in (*groups, "critic_lora")})
    model, _ = load_transformer(write(tmp_path / "base.safetensors", state), lora=path)
    assert equal_bits(model.state_dict(), merged(state, lora))
    info = inspect(path)
    assert (info.kind, info.top_key) == ("lora", groups[-1])
    assert info.notes == ("rank 4 on 20 linear layers", "scale 1")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_peft_wrapped_model_is_merged_on_load(scale: float, state: State, tmp_path: Path) -> None:
    lora = make_lora(state, 4, "base_model.model.{}.lora_{}.default.weight")
    wrapped = dict(lora)
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        adapted = LINEAR.fullmatch(f"{layer}.weight") is not None
        wrapped[f"base_model.model.{layer}{'.base_layer' * adapted}.{leaf}"] = tensor
    path = write(tmp_path / "adapter_model.bin", wrapped)
    if scale != 1:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4 * scale}))
    expected = merged(state, make_lora(state, 4), scale)
    model, info = load_transformer(path)
    assert equal_bits(model.state_dict(), expected)
    assert (info.kind, info.merged_lora) == ("transformer", 20)
    assert any("merged on load" in note for note in info.notes)
    handed, _ = read_transformer(path)
    assert set(handed) == set(state) and all(
        torch.equal(handed[name], expected[name]) for name in state
    )


def test_the_command_line_takes_the_preset_of_a_published_lora(
    state: State, tmp_path: Path, capsys
) -> None:
    base = write(tmp_path / "self_forcing_dmd.pt", {"generator_ema": prefixed(state, "model.")})
    lora = write(tmp_path / "opsdv_self_forcing_lora.pt", {"generator_lora": make_lora(state, 4)})
    request = [
        "generate",
        "--model",
        str(base),
        "--prompt",
        "a",
        "--out",
        str(tmp_path / "a.mp4"),
        "--dry-run",
    ]
    for more, preset in (([], "self-forcing"), (["--lora", str(lora)], "opsd-v")):
        assert main([*request, "--frames", "9", "--size", "64x64", *more]) == 0
        assert f"preset {preset} " in capsys.readouterr().err


def test_several_loras_are_merged_each_by_its_strength(state: State, tmp_path: Path) -> None:
    whole = {name: tensor.float() for name, tensor in state.items()}
    base = write(tmp_path / "base.safetensors", whole)
    first, second = (
        make_lora(state, 4),
        {name: 2 * tensor for name, tensor in make_lora(state, 2).items()},
    )
    files = [
        write(tmp_path / f"{number}.safetensors", lora)
        for number, lora in enumerate((first, second))
    ]

    def with_strengths(*strengths: float) -> State:
        loras = [LoraFile(path, strength) for path, strength in zip(files, strengths, strict=True)]
        model, info = load_transformer(base, lora=loras, dtype=torch.float32)
        assert info.merged_lora == 40
        return model.state_dict()

    expected = merged(merged(whole, first, 0.5), second, -2.0)
    torch.testing.assert_close(with_strengths(0.5, -2.0), expected)
    assert equal_bits(with_strengths(0.0, 0.0), whole)
    assert equal_bits(
        with_strengths(1.0, 0.0), load_transformer(base, lora=files[0])[0].state_dict()
    )


def test_a_lora_and_its_strength_are_read_from_a_text(tmp_path: Path) -> None:
    odd = tmp_path / "a:0.5"
    odd.touch()
    assert LoraFile.parse("style.safetensors") == LoraFile(Path("style.safetensors"))
    assert LoraFile.parse("a/style.pt:0.8") == LoraFile(Path("a/style.pt"), 0.8)
    assert LoraFile.parse("a.pt:-1") == LoraFile(Path("a.pt"), -1.0)
    assert LoraFile.parse(r"C:\loras\a.pt") == LoraFile(Path(r"C:\loras\a.pt"))
    assert LoraFile.parse(str(odd)) == LoraFile(odd)
    assert LoraFile.parse(f"{odd}:2") == LoraFile(odd, 2.0)
    for wrong in ("a.pt:1.2.3", "a.pt:1e9", "a.pt:nan"):
        with pytest.raises(ValueError, match=r"a\.pt"):
            LoraFile.parse(wrong)


def test_a_refiner_is_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "a.refiner.safetensors"
    keys = [f"autorefiner.blocks.0.ffn.0.lora_{matrix}.weight" for matrix in "AB"]
    save_file({keys[0]: torch.zeros(2, 4), keys[1]: torch.zeros(4, 2)}, path)
    with pytest.raises(ValueError, match="--refiner"):
        read_lora(path)


def test_loras_that_do_not_fit(state: State, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state)
    lora, key = make_lora(state, 4), "base_model.model.blocks.1.ffn.0.lora_"
    cases = {
        "layers.0.": {name.replace("blocks", "layers"): tensor for name, tensor in lora.items()},
        "[256, 8] for blocks.1.ffn.0": lora | {key + "A.weight": torch.zeros(4, 8)},
        "half a pair for blocks.1.ffn.0": {
            n: tensor for n, tensor in lora.items() if n != key + "B.weight"
        },
        "do not multiply": lora | {key + "A.weight": torch.zeros(3, 256)},
        "[256, 0] and [0, 256]": lora
        | {key + "A.weight": torch.zeros(0, 256), key + "B.weight": torch.zeros(256, 0)},
        "[256, 4] and []": lora | {key + "A.weight": torch.zeros(())},
        "an alpha of [2] for blocks.1.ffn.0": lora
        | {"base_model.model.blocks.1.ffn.0.alpha": torch.zeros(2)},
        "blocks.0.diff": lora | {"blocks.0.diff": torch.zeros(1)},
        "two of one layer": lora
        | {"diffusion_model.blocks.1.ffn.0.lora_down.weight": torch.zeros(4, 256)},
        "blocks.0.strange_name": {
            f"lora_unet_blocks_0_strange_name.lora_{p}.weight": torch.zeros(2, 2)
            for p in ("up", "down")
        },
        "'transformer'": state,
    }
    for number, (text, content) in enumerate(cases.items()):
        path = write(tmp_path / f"{number}.safetensors", content)
        assert inspect(path).kind in ("lora", "transformer")  # looking at it is never an error
        with pytest.raises(ValueError) as raised:
            load_transformer(base, lora=path)
        assert (
            text in str(raised.value)
            and str(path) in str(raised.value)
            and "\n" not in str(raised.value)
        )
