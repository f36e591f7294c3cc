"""A .pt costs no more memory than its bytes: compressed or overlong files are refused."""

import io
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autorefiner.refiner.cli import main
from autorefiner.refiner.demo.bundle import FILES, WEIGHTS
from autorefiner.refiner.wan import torch_file
from autorefiner.refiner.wan.torch_file import load_torch, plain_tensors
from autorefiner.refiner.wan.weight_file import MOST_HEADER, open_weights

MARKS = b"\x80\x02" + b"(" * 8_000_000 + b"."  # eight million nested lists, 280 MB and 20 s


def zipped(members: dict[str, bytes], compression: int) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "keyword"),
    [
        (zipped({"a/data.pkl": MARKS, "a/version": b"3\n"}, zipfile.ZIP_DEFLATED), "compressed"),
        (
            zipped({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(1 << 20)}, zipfile.ZIP_BZIP2),
            "compressed",
        ),
        (zipped({"a/data.pkl": MARKS, "a/version": b"3\n"}, zipfile.ZIP_STORED), "pickle"),
    ],
    ids=["deflated", "compressed data", "long"],
)
def test_a_zip_that_costs_more_than_its_bytes_is_not_unpickled(
    content: bytes, keyword: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was unpickled"))
    (tmp_path / "bomb.pt").write_bytes(content)
    with pytest.raises(ValueError, match=keyword):
        open_weights(tmp_path / "bomb.pt")


def test_a_pickle_that_is_not_zipped_is_left_after_so_many_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch_file.MOST_READS <= torch_file.MOST_PICKLE
    monkeypatch.setattr(torch_file, "MOST_READS", 20_000)
    (tmp_path / "bomb.pt").write_bytes(MARKS)
    with pytest.raises(ValueError, match="instructions"):
        open_weights(tmp_path / "bomb.pt")


def test_a_zip_of_very_many_members_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pt").write_bytes(
        zipped({f"a/data/{i}": b"" for i in range(400)}, zipfile.ZIP_STORED)
    )
    monkeypatch.setattr(torch_file, "MOST_DIRECTORY", 70_000)
    with pytest.raises(ValueError, match="whole torch file"):
        load_torch(tmp_path / "a.pt")
    monkeypatch.setattr(torch_file, "MOST_DIRECTORY", 10_000)
    with pytest.raises(ValueError, match="directory"):
        load_torch(tmp_path / "a.pt")


ODD = {
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.flatten(1).to_sparse_csr(),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x.bool(),
    "repeated": lambda x: torch.zeros(1).expand(1 << 20, 1 << 20),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_is_no_plain_one_is_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, vae = (load_file(WEIGHTS / FILES[name]) for name in ("student", "vae"))
    key, of_vae = "blocks.0.self_attn.q.weight", "decoder.conv1.weight"
    change = ODD[kind]
    torch.save({**model, key: change(model[key])}, tmp_path / "model.pt")
    torch.save(
        {"generator": {**model, key: change(model[key])}, "step": 3}, tmp_path / "grouped.pt"
    )
    torch.save({**vae, of_vae: change(vae[of_vae])}, tmp_path / "vae.pt")
    name = f"diffusion_model.{key.removesuffix('.weight')}"
    down, up = torch.randn(4, model[key].shape[1]), torch.randn(model[key].shape[0], 4)
    torch.save(
        {f"{name}.lora_A.weight": change(down), f"{name}.lora_B.weight": up}, tmp_path / "lora.pt"
    )
    common = [
        "generate",
        "--prompt",
        "a red star",
        "--frames",
        "1",
        "--out",
        str(tmp_path / "a.mp4"),
    ]
    tries = {
        "model.pt": ["--model", str(tmp_path / "model.pt"), "--vae", str(WEIGHTS / FILES["vae"])],
        "grouped.pt": [
            "--model",
            str(tmp_path / "grouped.pt"),
            "--vae",
            str(WEIGHTS / FILES["vae"]),
        ],
        "vae.pt": ["--model", "sprites", "--vae", str(tmp_path / "vae.pt")],
        "lora.pt": ["--model", "sprites", "--lora", str(tmp_path / "lora.pt")],
    }
    for name, arguments in tries.items():
        assert main([*common, *arguments]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(rf"error: .*{name}.* (tensor|view)", line), line


def test_a_flag_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    weights = {"blocks.0.x": torch.ones(3)}
    torch.save({"generator": weights, "found_inf": torch.tensor(True)}, tmp_path / "a.pt")
    file = open_weights(tmp_path / "a.pt")
    assert list(file.groups) == ["generator"]


def test_tensors_of_more_bytes_than_the_file_are_refused() -> None:
    data = torch.zeros(1000)
    tied = {"a": data, "b": data}
    assert plain_tensors(tied, nbytes=4000).keys() == tied.keys()
    with pytest.raises(ValueError, match="bytes"):
        plain_tensors({**tied, "c": data}, nbytes=4000)
    assert plain_tensors({"a": data.view(10, 100).T, "b": data[:10]}, nbytes=8000)
    assert plain_tensors([data], nbytes=0) == {}


def test_a_header_that_is_too_long_is_refused(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(1)},
        tmp_path / "a.safetensors",
        metadata={"note": "n" * (MOST_HEADER + 1)},
    )
    with pytest.raises(ValueError, match="header"):
        open_weights(tmp_path / "a.safetensors")
