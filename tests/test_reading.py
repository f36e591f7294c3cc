"""Only regular files are read, up to the expected size."""

import os
import socket
from pathlib import Path

import pytest

from autorefiner.refiner import reading
from autorefiner.refiner.cli import main
from autorefiner.refiner.demo.bundle import FILES, WEIGHTS
from autorefiner.refiner.reading import open_regular, read_bytes, read_json, read_text
from autorefiner.refiner.train import read_prompts, seal
from autorefiner.refiner.train_config import TrainConfig
from autorefiner.refiner.training.log import read_rows
from autorefiner.refiner.wan.lora import read_lora
from autorefiner.refiner.wan.text import load_text_encoder
from autorefiner.refiner.wan.weight_file import open_weights

IRREGULAR = ("pipe", "device", "folder", "socket", "link")


@pytest.fixture(params=IRREGULAR)
def irregular(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Create a path that is no regular file: a pipe, device, folder, link or socket."""
    path = tmp_path / "one"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "link":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    else:
        monkeypatch.chdir(tmp_path)  # socket paths must be short
        socket.socket(socket.AF_UNIX).bind("one")
    return path


READERS = {
    "bytes": lambda path: read_bytes(path, 9),
    "weights": open_weights,
    "LoRA": read_lora,
    "prompts": lambda path: read_prompts(str(path)),
    "training": TrainConfig.read,
    "log": read_rows,
    "tokenizer": lambda path: load_text_encoder(WEIGHTS / FILES["text"], path),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_before_it_is_opened(
    reader: str, irregular: Path
) -> None:
    with pytest.raises(ValueError, match=r"regular|folder|tokenizer|encoder") as error:
        READERS[reader](irregular)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", [["inspect"], ["train"]])
def test_commands_say_so_in_one_line(
    command: list[str], irregular: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*command, str(irregular)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_pipe_in_a_models_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"regular|folder"):
        open_weights(tmp_path)
    with pytest.raises(ValueError, match="regular"):
        seal(tmp_path / "model.safetensors")


def test_a_pipe_that_takes_a_files_place_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "one")
    monkeypatch.setattr(reading, "check_regular", lambda path: None)
    with pytest.raises(ValueError, match="regular"):
        open_regular(tmp_path / "one")


def test_no_more_bytes_are_read_than_a_file_may_have(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match="most"):
        read_bytes(path, 4)
    endless = Path("/proc/self/mem")  # a regular file of size 0 that cannot be read
    with pytest.raises((OSError, ValueError)):
        read_bytes(endless, 4)
    sparse = tmp_path / "sparse.toml"
    sparse.touch()
    os.truncate(sparse, 1 << 40)
    with pytest.raises(ValueError, match="most"):
        TrainConfig.read(sparse)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text", ["a red star\nein grüner Kreis\n", "a", "ä 日本 🦊 and more words", ""]
)
def test_text_is_read_as_editors_save_it(text: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    assert read_text(path, 99) == text


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", "ä".encode("latin-1"), "a fox".encode("utf-32-le"), b"a\0b" * 9]
)
def test_other_text_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="UTF-8"):
        read_text(path, 99)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "9" * 5000, ""])
def test_what_is_no_json_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not JSON") as error:
        read_json(path, 1 << 20)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "a = " + "[" * 5000,
        "[a" + ".a" * 5000 + "]\nb = 1",
        "out = " + "{a = " * 3000 + "1" + "}" * 3000,
        "steps = \0",
    ],
)
def test_a_training_that_is_no_toml_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"t\.toml") as error:
        TrainConfig.read(path)
    assert len(str(error.value).splitlines()) == 1
