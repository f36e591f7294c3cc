"""Models in shards open by index, by file names or by one shard; errors name what is missing."""

import json
import os
from pathlib import Path

import pytest
import torch
from published import State, equal_bits, in_diffusers, make_state, message, prefixed, write
from safetensors.torch import load_file

from autorefiner.refiner.cli import main
from autorefiner.refiner.wan.checkpoint import inspect, load_transformer
from autorefiner.refiner.wan.lora import LoraFile
from autorefiner.refiner.wan.lora_scale import stated_scale
from autorefiner.refiner.wan.umt5 import open_umt5
from autorefiner.refiner.wan.weight_file import open_weights


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


def write_shards(folder: Path, state: State, suffix: str = "safetensors") -> Path:
    stem = "diffusion_pytorch_model" if suffix == "safetensors" else "pytorch_model"
    where = {
        name: f"{stem}-0000{1 + number % 2}-of-00002.{suffix}" for number, name in enumerate(state)
    }
    for shard in sorted(set(where.values())):
        write(
            folder / shard, {name: tensor for name, tensor in state.items() if where[name] == shard}
        )
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_of_shards(suffix: str, state: State, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, state, suffix)
    model, info = load_transformer(folder)
    assert equal_bits(model.state_dict(), state)
    assert (info.container, info.tensors) == ("2 shards", len(state))


def test_damaged_folders_of_shards(state: State, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, state)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    right = index.read_text()
    names = json.loads(right)["weight_map"]
    shard = names["head.head.bias"]
    for text, content in {
        "index": "[]",
        "`weight_map`": "[" * 100_000,
        "../x.safetensors": json.dumps({"weight_map": {"a": "../x.safetensors"}}),
        "(a)": json.dumps({"weight_map": names | {"a": shard}}),
    }.items():
        index.write_text(content)
        assert text in message(folder)
    index.write_text(right)
    (folder / shard).unlink()
    assert shard in message(folder)


def test_a_folder_with_one_file_of_a_known_name(state: State, tmp_path: Path) -> None:
    write(tmp_path / "diffusion_pytorch_model.safetensors", state)
    assert equal_bits(load_transformer(tmp_path)[0].state_dict(), state)


# ---- without an index


def message_of_part(path: Path) -> str:
    """Return the error of opening it, which must be one line."""
    with pytest.raises(ValueError) as raised:
        inspect(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def cut(folder: Path, state: State, names: tuple[str, ...], role: str = "") -> list[Path]:
    """Write the state to files of these names, dealing out tensors in turn."""
    shards = [dict(list(state.items())[number :: len(names)]) for number in range(len(names))]
    return [
        write(folder / name, prefixed(shard, role))
        for name, shard in zip(names, shards, strict=True)
    ]


NAMES = {
    "safetensors": ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "bin": (
        "pytorch_model-00001-of-00003.bin",
        "pytorch_model-00002-of-00003.bin",
        "pytorch_model-00003-of-00003.bin",
    ),
    "from 0": ("wan-0-of-2.safetensors", "wan-1-of-2.safetensors"),
    "alone": ("wan-00001-of-00001.safetensors",),
}


@pytest.mark.parametrize("role", ["", "generator_ema.model."])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_shards_without_an_index_are_read_together(
    names, role, state: State, tmp_path: Path
) -> None:
    paths = cut(tmp_path, state, names, role)
    for path in (tmp_path, *paths):
        model, info = load_transformer(path)
        assert equal_bits(model.state_dict(), state)
        assert (info.container, info.prefix) == (f"{len(names)} shards", role)
    assert inspect(paths[0]).path == paths[0]


def test_a_missing_shard_is_named(state: State, tmp_path: Path) -> None:
    paths = cut(tmp_path, state, NAMES["bin"])
    paths[1].unlink()
    for path in (tmp_path, paths[0], paths[2]):
        assert "pytorch_model-00002-of-00003.bin" in message_of_part(path)
    huge = write(tmp_path / "b" / "wan-00001-of-999999999.safetensors", {"a": torch.zeros(1)})
    assert "wan-00002-of-999999999.safetensors" in message_of_part(huge)


@pytest.mark.parametrize("indexed", [True, False])
def test_the_metadata_of_shards_is_read(indexed: bool, state: State, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, state)
    for path in folder.glob("*.safetensors"):
        write(path, load_file(path), {"config": '{"transformer": {"num_heads": 4}}'})
    if not indexed:
        (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert load_transformer(folder)[0].config.num_heads == 4


def test_other_files_are_no_shards_of_the_set(state: State, tmp_path: Path) -> None:
    cut(tmp_path, state, NAMES["safetensors"])
    write(tmp_path / "vae.safetensors", {"a": torch.zeros(1)})
    assert equal_bits(load_transformer(tmp_path)[0].state_dict(), state)
    cut(tmp_path, state, ("other-00001-of-00002.safetensors", "other-00002-of-00002.safetensors"))
    assert "model-00001-of-00002.safetensors" in message(tmp_path), "two sets: one is to be passed"
    for name in ("model", "other"):
        assert equal_bits(
            load_transformer(tmp_path / f"{name}-00002-of-00002.safetensors")[0].state_dict(), state
        )


def test_a_tensor_in_two_shards_is_refused(state: State, tmp_path: Path) -> None:
    for name in NAMES["safetensors"]:
        write(tmp_path / name, state)
    assert "two shards" in message_of_part(tmp_path)


# ---- diffusers' folders


def test_a_pipeline_is_opened_at_its_root(state: State, tmp_path: Path) -> None:
    write_shards(tmp_path / "transformer", in_diffusers(state))
    write(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "model_index.json").write_text("{}")
    model, info = load_transformer(tmp_path)
    assert equal_bits(model.state_dict(), state)
    assert (info.path, info.naming) == (tmp_path / "transformer", "diffusers")
    (tmp_path / "model_index.json").unlink()
    assert "transformer" in message(tmp_path), "without it, the folders are listed"


@pytest.mark.parametrize(
    "index", [{"transformer_2": ["diffusers", "Wan"]}, {"boundary_ratio": 0.875}]
)
def test_a_pipeline_of_two_networks_is_known_by_its_index(
    index: dict, state: State, tmp_path: Path
) -> None:
    write(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", in_diffusers(state))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="experts"):
        load_transformer(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", "[" * 100_000, '{"transformer_2": [null, null]}', "\udcff"]
)
def test_a_pipeline_is_whole_unless_its_index_names_a_second_network(
    content, state: State, tmp_path: Path
) -> None:
    write(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", in_diffusers(state))
    (tmp_path / "model_index.json").write_text(content, errors="surrogateescape")
    (tmp_path / "transformer" / "config.json").write_text(content, errors="surrogateescape")
    assert equal_bits(load_transformer(tmp_path)[0].state_dict(), state)


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="links need rights")
def test_a_folder_in_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "transformer").symlink_to(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert "folder" in message_of_part(tmp_path)


def test_a_distributed_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    assert "dcp_to_torch" in message(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_beside_the_weights_are_not_waited_for(state: State, tmp_path: Path) -> None:
    for name in ("config.json", "model_index.json", "adapter_config.json"):
        os.mkfifo(tmp_path / name)
    write(tmp_path / "diffusion_pytorch_model.safetensors", in_diffusers(state))
    assert inspect(tmp_path).kind == "transformer"
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        stated_scale(tmp_path, {})
    with pytest.raises(ValueError, match=r"config\.json"):
        open_umt5(tmp_path)


# ---- over-long names


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".safetensors", "x" * 5000, "a-00001-of-00002.safetensors" * 20]
)
def test_names_that_no_file_system_takes_are_one_line(name: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / name
    with pytest.raises(ValueError, match="cannot be opened"):
        open_weights(path)
    assert LoraFile.parse(str(path)) == LoraFile(path)
    request = [
        "generate",
        "--model",
        str(path),
        "--prompt",
        "a",
        "--out",
        str(tmp_path / "a.mp4"),
        "--dry-run",
    ]
    for arguments in (
        ["inspect", str(path)],
        request,
        [*request[:2], "sprites", *request[3:], "--lora", str(path)],
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_index_with_an_over_long_name_is_one_short_line(state: State, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, state)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    assert "shards" in message(folder) and len(message(folder)) < 500
    index.write_text(
        json.dumps(
            {"weight_map": {"a" * 5000: "diffusion_pytorch_model-00001-of-00002.safetensors"}}
        )
    )
    assert len(message(folder)) < 500
