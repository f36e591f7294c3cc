"""Files are opened safely, refused in one line, read from shards, and written atomically."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from published import FSDP, State, equal_bits, make_state, message, prefixed, write
from safetensors import SafetensorError

from autorefiner.refiner.wan import weight_file
from autorefiner.refiner.wan.checkpoint import load_transformer, save_safetensors
from autorefiner.refiner.wan.weight_file import open_weights


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


def test_legacy_torch_files_load_too(state: State, tmp_path: Path) -> None:
    torch.save(
        {"generator": prefixed(state, "model.")},
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    assert equal_bits(load_transformer(tmp_path / "old.pt")[0].state_dict(), state)


def test_parameters_in_a_file_load_as_their_values(state: State, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.pt", {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    )
    assert not any(tensor.requires_grad for tensor in open_weights(path).groups["flat"].values())
    assert equal_bits(load_transformer(path)[0].state_dict(), state)


def test_files_with_the_other_suffix(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.safetensors")
    assert ".pt" in message(tmp_path / "a.safetensors")
    write(tmp_path / "b.safetensors", state).rename(tmp_path / "b.pt")
    assert equal_bits(load_transformer(tmp_path / "b.pt")[0].state_dict(), state)


class Malicious:
    """An object whose unpickling would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_would_run_code_is_refused(state: State, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save(
        {"generator": prefixed(state, "model."), "config": Malicious(mark)}, tmp_path / "a.pt"
    )
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Malicious(mark), protocol=2))
    (tmp_path / "c.pth").write_bytes(pickle.dumps({"generator": 1}, protocol=2))
    assert ".system" in message(tmp_path / "a.pt")
    assert ".system" in message(tmp_path / "b.pt")
    assert "torch file" in message(tmp_path / "c.pth")
    assert not mark.exists()
    pickle.loads((tmp_path / "b.pt").read_bytes())
    assert mark.exists()  # the file does what it says


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.pt", b"", "empty"),
        ("a.safetensors", b"", "empty"),
        ("a.pt", b"<!DOCTYPE html><html>404</html>" * 9, "text file"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS"),
        ("a.gguf", b"GGUF\x03\0\0\0" * 9, "GGUF"),
        ("a.pt", bytes(range(256)), "neither"),
        ("a.safetensors", b"\xff" * 8 + b'{"a":1}', "damaged"),
    ],
)
def test_files_that_are_no_weights(name: str, content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert text in message(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("share", [0.999, 0.5, 0.001])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_files_cut_short(kind: str, share: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        write(path, state)
    os.truncate(path, int(path.stat().st_size * share))
    assert "cut short" in message(path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_too_large_to_map(
    suffix: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / f"a.{suffix}", state)
    opened = weight_file.safe_open

    def refuse(*_, framework: str = "pt", **__):
        if framework == "pt":
            raise RuntimeError("unable to mmap 28577112509 bytes: Cannot allocate memory (12)")
        return opened(path, framework=framework)

    monkeypatch.setattr(weight_file, "safe_open", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert "0.0 GB" in message(path)


def test_a_safetensors_file_may_begin_like_a_pickle(tmp_path: Path) -> None:
    for length in range(64):
        path = write(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {"pad": "x" * 8 * length})
        assert torch.equal(open_weights(path).read("flat", "a"), torch.ones(2))
        if path.read_bytes().startswith(b"\x80"):
            return
    raise AssertionError("no header length begins as a pickle does")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "none.pt")
    assert ".safetensors" in message(tmp_path)
    write(tmp_path / "sub" / "some.pt", {"a": torch.zeros(1)})
    assert str(Path("sub") / "some.pt") in message(tmp_path)


def test_torch_files_without_a_model(tmp_path: Path) -> None:
    assert "list" in message(write(tmp_path / "a.pt", [1, 2]))
    assert "step, optimizer" in message(write(tmp_path / "b.pt", {"step": 1, "optimizer": {}}))
    assert "only 7" in message(write(tmp_path / "c.pt", {7: torch.zeros(2)}))  # names are text
    assert "known kind" in message(write(tmp_path / "c.pt", {"a": torch.zeros(1)}))


@pytest.mark.parametrize("shape", [[0, 1 << 62, 1 << 62], [0, 1 << 63]])
def test_sides_that_no_tensor_has(shape: list[int], tmp_path: Path) -> None:
    """The library only checks the number of values, so a size of 0 lets any others through."""
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is damaged" in message(tmp_path / "a.safetensors")


# ---- saving


def test_saving_is_complete_or_absent(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_the_library_cannot_write_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(weight_file, "save_file", full_disk)
    with pytest.raises(OSError, match=r"a\.safetensors"):
        save_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


def test_a_loaded_pt_can_be_saved_over_and_again(state: State, tmp_path: Path) -> None:
    model, _ = load_transformer(
        write(
            tmp_path / "a.pt",
            {"generator_ema": prefixed(state, FSDP), "generator": {"a": torch.zeros(1)}},
        )
    )
    save_safetensors(tmp_path / "a.pt", model.state_dict(), {})
    assert equal_bits(load_transformer(tmp_path / "a.pt")[0].state_dict(), state)


def test_transposed_weights_save_and_load(tmp_path: Path) -> None:
    wide = torch.arange(6.0).view(2, 3)
    save_safetensors(tmp_path / "a.safetensors", {"a": wide.t()}, {})
    file = open_weights(tmp_path / "a.safetensors")
    assert file.groups["flat"]["a"].is_meta
    assert torch.equal(file.read("flat", "a"), wide.t())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'config'"):
        save_safetensors(tmp_path / "a.safetensors", {}, {"config": {}})
    with pytest.raises(ValueError, match="not a folder"):
        save_safetensors(tmp_path / "none" / "a.safetensors", {}, {})


def test_a_saved_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
