"""The latents file grows chunk by chunk and is readable wherever writing stopped."""

import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from autorefiner.refiner.latents import (
    HEADER,
    LatentWriter,
    count_latents,
    first_lengths,
    format_lengths,
    inspect_latents,
    is_latents,
    parse_lengths,
    read_latents,
)


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


def killed(path, chunks, metadata, given=None):
    """Return the bytes of a file whose writer never closed it."""
    writer = LatentWriter(path, (16, 4, 6), metadata, given)
    for chunk in chunks:
        writer.write(chunk)
    return writer.partial.read_bytes()


SAYS = {"seed": "7", "chunk_lengths": "3x2,1"}
# Written by 0.1: 7 latent frames in chunks of 3.
OLD = {"seed": "7", "preset": "self-forcing", "frames": "25"}


@pytest.mark.filterwarnings("ignore:.*unfinished chunk")
@pytest.mark.parametrize("metadata", [SAYS, OLD], ids=["lengths", "preset"])
@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_file_cut_off_anywhere_gives_its_whole_chunks(tmp_path, chunks, metadata, given) -> None:
    whole, start = torch.cat(chunks, 2), torch.cat(chunks[:given], 2) if given else None
    data, cut = (
        killed(tmp_path / "a.safetensors", chunks[given:], metadata, start),
        tmp_path / "cut.safetensors",
    )
    for frames in range(3 * given, 8):
        for extra in (0, 1, 4 * 16 * 24 - 1):
            body = 8 + HEADER + 4 * 16 * 24 * frames + (extra if frames < 7 else 0)
            cut.write_bytes(data[:body])
            kept = {0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 3, 6: 6, 7: 7}[frames]
            assert inspect_latents(cut).frames == count_latents(cut) == kept
            assert inspect_latents(cut).cut == (len(data[:body]) > 8 + HEADER + 4 * 16 * 24 * kept)
            if kept:
                latents, said = read_latents(cut)
                assert torch.equal(latents, whole[:, :, :kept])
                assert said == metadata


@pytest.mark.filterwarnings("ignore:.*unfinished chunk")
def test_the_given_frames_of_an_old_file_are_no_chunk_of_its_preset(tmp_path) -> None:
    """One frame was given, as from a picture; the chunks of 3 begin after it."""
    frames = torch.randn(1, 16, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    writer = LatentWriter(tmp_path / "a.safetensors", (16, 4, 6), OLD)
    writer.write(frames[:, :, :1])
    begun = writer.close(True)
    added = frames[0, :, 1:].transpose(0, 1).contiguous().numpy().tobytes()
    begun.write_bytes(begun.read_bytes() + added)  # 1 + 3 frames, and 2 of the next chunk
    assert torch.equal(read_latents(begun)[0], frames[:, :, :4])


def test_what_was_cut_off_is_said(tmp_path, chunks) -> None:
    data, cut = killed(tmp_path / "a.safetensors", chunks, SAYS), tmp_path / "cut.safetensors"
    cut.write_bytes(data[:-1])
    with pytest.warns(UserWarning, match="6 latent frames"):
        read_latents(cut)


@pytest.mark.filterwarnings("error")
def test_a_file_that_was_closed_holds_whole_chunks_whatever_its_preset(tmp_path, chunks) -> None:
    for finished in (True, False):
        writer = LatentWriter(tmp_path / "a.safetensors", (16, 4, 6), OLD)
        writer.write(torch.cat(chunks, 2)[:, :, :5])
        assert read_latents(writer.close(finished))[0].shape[2] == 5


def test_chunk_lengths_are_written_as_they_are_read() -> None:
    for lengths, text in (
        ((3, 3, 3, 1), "3x3,1"),
        ((1,), "1"),
        ((1, 3, 3, 2), "1,3x2,2"),
        ((1, 1, 1), "1x3"),
    ):
        assert format_lengths(lengths) == text
        assert [length for length, count in parse_lengths(text) for _ in range(count)] == [*lengths]
        assert first_lengths(text, sum(lengths)) == [*lengths]
        assert first_lengths(text, sum(lengths) - 1) == [*lengths[:-1]]
    assert first_lengths("3,1x9", 2) == [], "chunks do not change their order"
    for text in ("", "0", "3x0", "3,", "a", "3x", "-1", "1" * 20):
        with pytest.raises(ValueError, match="chunk lengths"):
            parse_lengths(text)


def test_lengths_that_are_not_understood_are_refused(tmp_path, chunks) -> None:
    cut = tmp_path / "cut.safetensors"
    for metadata in (
        {"chunk_lengths": "3x"},
        {"preset": "self-forcing"},
        {"preset": "self-forcing", "frames": "x"},
    ):
        cut.write_bytes(killed(tmp_path / "a.safetensors", chunks, metadata))
        with pytest.raises(ValueError, match="not a latents file"):
            read_latents(cut)
    cut.write_bytes(killed(tmp_path / "a.safetensors", chunks, {"chunk_lengths": "3x999999999"}))
    assert count_latents(cut) == 6


def test_a_chunk_is_on_disk_when_it_is_written(tmp_path, chunks, monkeypatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    writer = LatentWriter(tmp_path / "a.safetensors", (16, 4, 6), SAYS, chunks[0])
    for chunk in chunks[1:]:
        writer.write(chunk)
    ends = [8 + HEADER + 4 * 16 * 24 * frames for frames in (3, 3, 6, 7)]
    assert [size for size in synced if size in ends] == synced
    assert {*synced} == {*ends}


def test_an_interrupted_write_leaves_plain_safetensors(tmp_path, chunks) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        LatentWriter(tmp_path / "a.safetensors", (16, 4, 6), SAYS) as writer,
    ):
        writer.write(chunks[0])
        writer.file.write(b"\0" * 1000)
        raise KeyboardInterrupt
    partial = tmp_path / "a.partial.safetensors"
    assert torch.equal(load_file(partial)["latents"], chunks[0][0].transpose(0, 1))
    assert not inspect_latents(partial).cut


def test_other_files_are_refused_in_one_line(tmp_path) -> None:
    other, text, empty = (
        tmp_path / "model.safetensors",
        tmp_path / "a.txt",
        tmp_path / "none.safetensors",
    )
    save_file({"weight": torch.zeros(3)}, other)
    text.write_text("hello")
    for path in (other, text):
        with pytest.raises(ValueError, match="not a latents file"):
            read_latents(path)
    write(empty, [])
    with pytest.raises(ValueError, match="no finished chunk"):
        read_latents(empty)
    with pytest.raises(ValueError, match="does not exist"):
        read_latents(tmp_path / "missing.safetensors")
    shaped = b'{"latents": {"shape": [1, 16, 4, 6]}, "__metadata__": %s}'
    untold = [shaped % metadata for metadata in (b"[1]", b'{"seed": 7}')]
    wrong = (
        b"[]",
        b"[" * HEADER,
        b'{"latents": 3}',
        b'{"latents": {"shape": [1, 0, 4, 6]}}',
        b"\xff",
        *untold,
    )
    for header in wrong:
        text.write_bytes(struct.pack("<Q", HEADER) + header.ljust(HEADER))
        assert not is_latents(text)
        with pytest.raises(ValueError, match="not a latents file"):
            read_latents(text)
    with pytest.raises(ValueError, match="prompt"):
        LatentWriter(tmp_path / "b.safetensors", (16, 4, 6), {"prompt": "x" * 20000})
    assert not list(tmp_path.glob("b*"))


def test_frames_larger_than_the_file_are_no_chunk(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    for sides in (f"{1 << 32}, {1 << 32}", f"{1 << 70}, 1"):  # more values than 64 bits count
        header = f'{{"latents": {{"shape": [1, {sides}, 4]}}}}'.encode()
        path.write_bytes(struct.pack("<Q", HEADER) + header.ljust(HEADER) + bytes(64))
        with pytest.raises(ValueError, match="no finished chunk"):
            read_latents(path)


def test_a_full_disk_leaves_whole_chunks(tmp_path, chunks) -> None:
    """A file-size limit halfway through the second chunk stands for a full disk."""
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
    assert str(partial) in ended.stderr.splitlines()[-1]
    assert partial.stat().st_size == first
    assert torch.equal(load_file(partial)["latents"], torch.ones(3, 16, 4, 6))
