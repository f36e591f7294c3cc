"""The latents file: grows by chunks, and is readable whenever it stopped."""

import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from autorefiner.refiner.latents import HEADER, LatentWriter, is_latents, read_latents


@pytest.fixture
def chunks():
    return [torch.randn(1, 16, frames, 4, 6) for frames in (3, 3, 1)]


def write(path, chunks, finished=True):
    writer = LatentWriter(path, (16, 4, 6), {"prompt": "a star", "seed": "7"})
    for chunk in chunks:
        writer.write(chunk)
    return writer.close(finished)


def test_a_finished_file_is_plain_safetensors(tmp_path, chunks) -> None:
    path = write(tmp_path / "a.safetensors", chunks)
    whole = torch.cat(chunks, 2)
    assert torch.equal(load_file(path)["latents"], whole[0].transpose(0, 1))
    latents, metadata = read_latents(path)
    assert torch.equal(latents, whole)
    assert metadata == {"prompt": "a star", "seed": "7"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_stopped_file_stays_partial_and_leaves_the_old_one(tmp_path, chunks) -> None:
    old = write(tmp_path / "a.safetensors", chunks[:1])
    partial = write(tmp_path / "a.safetensors", chunks[1:], finished=False)
    assert partial.name == "a.partial.safetensors"
    assert torch.equal(read_latents(old)[0], chunks[0])
    assert torch.equal(read_latents(partial)[0], torch.cat(chunks[1:], 2))
    assert load_file(partial)["latents"].shape == (4, 16, 4, 6)


@pytest.mark.parametrize(("lost", "frames"), [(0, 6), (1, 5), (4 * 16 * 24, 5)])
def test_a_file_cut_off_by_a_kill_gives_its_whole_frames(tmp_path, chunks, lost, frames) -> None:
    writer = LatentWriter(tmp_path / "a.safetensors", (16, 4, 6), {"seed": "7"})
    for chunk in chunks[:2]:
        writer.write(chunk)  # and no close: what a kill leaves
    data = writer.partial.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data[: len(data) - lost])
    latents, metadata = read_latents(cut)
    assert torch.equal(latents, torch.cat(chunks[:2], 2)[:, :, :frames])
    assert metadata == {"seed": "7"}


def test_other_files_are_refused_in_one_line(tmp_path) -> None:
    other, text, empty = tmp_path / "model.safetensors", tmp_path / "a.txt", tmp_path / "none.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    text.write_text("hello")
    for path in (other, text):
        with pytest.raises(ValueError, match="is not a latents file: give one written by --save-latents"):
            read_latents(path)
    write(empty, [])
    with pytest.raises(ValueError, match="holds no finished chunk"):
        read_latents(empty)
    shaped = b'{"latents": {"shape": [1, 16, 4, 6]}, "__metadata__": %s}'
    untold = [shaped % metadata for metadata in (b"[1]", b'{"seed": 7}')]
    wrong = (b"[]", b"[" * HEADER, b'{"latents": 3}', b'{"latents": {"shape": [1, 0, 4, 6]}}', b"\xff", *untold)
    for header in wrong:
        text.write_bytes(struct.pack("<Q", HEADER) + header.ljust(HEADER))
        assert not is_latents(text)
        with pytest.raises(ValueError, match="is not a latents file"):
            read_latents(text)
    with pytest.raises(ValueError, match="shorten the prompt"):
        LatentWriter(tmp_path / "b.safetensors", (16, 4, 6), {"prompt": "x" * 20000})
    assert not list(tmp_path.glob("b*"))


def test_frames_larger_than_the_file_are_no_chunk(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    for sides in (f"{1 << 32}, {1 << 32}", f"{1 << 70}, 1"):  # more values than 64 bits count
        header = f'{{"latents": {{"shape": [1, {sides}, 4]}}}}'.encode()
        path.write_bytes(struct.pack("<Q", HEADER) + header.ljust(HEADER) + bytes(64))
        with pytest.raises(ValueError, match="holds no finished chunk"):
            read_latents(path)


def test_a_full_disk_leaves_whole_chunks(tmp_path, chunks) -> None:
    """A limit of the process's own, in the middle of the second chunk, stands for the disk's."""
    first = HEADER + 8 + chunks[0].nbytes
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from autorefiner.refiner.latents import LatentWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({first + 2000}, resource.RLIM_INFINITY))\n"
        "with LatentWriter(Path(sys.argv[1]), (16, 4, 6), {}) as writer:\n"
        "    for _ in range(2):\n"
        "        writer.write(torch.ones(1, 16, 3, 4, 6))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.safetensors")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    partial = tmp_path / "a.partial.safetensors"
    assert f"{partial}: a chunk could not be written (File too large): make room, then go on" in ended.stderr
    assert partial.stat().st_size == first
    assert torch.equal(load_file(partial)["latents"], torch.ones(3, 16, 4, 6))
