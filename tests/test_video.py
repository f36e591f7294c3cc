"""Streaming video: every chunk is playable once written, and no good file is overwritten."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from autorefiner.refiner.files import partial_path
from autorefiner.refiner.fragments import boxes
from autorefiner.refiner.pictures import contact_sheet
from autorefiner.refiner.video import VideoWriter, read_frames, read_metadata, to_frames

from decoding import decoded_picture

LENGTHS = (9, 12, 12)


def smooth(frames: int, start: int = 0) -> np.ndarray:
    """Return frames whose brightness identifies them: 4 levels a frame."""
    levels = 20 + 4 * (start + np.arange(frames, dtype=np.uint8))
    return np.broadcast_to(levels[:, None, None, None], (frames, 32, 48, 3)).copy()


def write(path, lengths=LENGTHS, **options) -> None:
    with VideoWriter(path, 48, 32, **options) as video:
        for index, length in enumerate(lengths):
            video.write(smooth(length, sum(lengths[:index])))


def test_frames_and_times_are_those_written(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    write(path)
    frames = read_frames(path)
    assert frames.shape == (33, 32, 48, 3)
    assert np.abs(frames.astype(int) - smooth(33)).max() <= 3
    with av.open(str(path)) as container:
        assert container.duration == pytest.approx(33 / 16 * 1e6)
        packets = [packet for packet in container.demux(video=0) if packet.size]
    with av.open(str(path)) as container:
        assert [frame.time for frame in container.decode(video=0)] == [
            index / 16 for index in range(33)
        ]
    assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 9, 21], (
        "one GOP a chunk"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_the_fragments_of_a_partial_file_are_numbered_in_turn(tmp_path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 48, 32) as video:
        for _ in range(3):
            video.write(smooth(4))
        data = partial_path(tmp_path / "a.mp4").read_bytes()
    moofs = [box for kind, box in boxes(data) if kind == b"moof"]
    assert [int.from_bytes(box[20:24], "big") for box in moofs] == [1, 2, 3]


def test_a_chunk_can_be_read_while_the_next_is_made(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 48, 32) as video:
        for done in (9, 21, 33):
            video.write(smooth(done - video.frames))
            assert len(read_frames(partial_path(path))) == done
        assert not path.exists()


def test_a_cut_within_a_chunk_begins_no_group_of_pictures(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 48, 32) as video:
        for _ in range(2):
            video.write(noise.repeat(6, axis=0))
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 24]


def test_without_x264_another_encoder_writes_the_same_frames(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    path = tmp_path / "a.mp4"
    write(path, lengths=(9, 16, 8))
    assert np.abs(read_frames(path).astype(int) - smooth(33)).max() <= 4
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 9, 25]


def test_tensors_are_frames_too(tmp_path) -> None:
    with VideoWriter(tmp_path / "torch.mp4", 48, 32) as video:
        video.write(torch.from_numpy(smooth(33)))
    with VideoWriter(tmp_path / "numpy.mp4", 48, 32) as video:
        video.write(smooth(33))
    assert (tmp_path / "torch.mp4").read_bytes() == (tmp_path / "numpy.mp4").read_bytes()


def test_metadata_comes_back_as_it_was(tmp_path) -> None:
    metadata = {
        "prompt": 'a "red" fox; 狐狸\nin the snow = cold',
        "seed": "7",
        "preset": "self-forcing",
    }
    write(tmp_path / "a.mp4", metadata=metadata)
    assert read_metadata(tmp_path / "a.mp4") == metadata


def test_a_killed_run_leaves_every_chunk_that_was_written(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    script = (
        "import os, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from autorefiner.refiner.video import VideoWriter\n"
        "video = VideoWriter(Path(sys.argv[1]), 48, 32, metadata={'seed': '7'})\n"
        "for length in (9, 12): video.write(np.full((length, 32, 48, 3), 90, np.uint8))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    assert read_frames(partial_path(path)).shape[0] == 21
    assert read_metadata(partial_path(path)) == {"seed": "7"}
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_keeps_the_old_file_and_the_chunks(tmp_path, error) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(error), VideoWriter(path, 48, 32) as video:
        video.write(smooth(9))
        raise error
    assert path.read_bytes() == b"old"
    assert len(read_frames(partial_path(path))) == 9


def test_what_was_cut_off_is_cut_away(tmp_path) -> None:
    """A full disk ends a write halfway."""
    with pytest.raises(OSError), VideoWriter(tmp_path / "a.mp4", 48, 32) as video:
        video.write(smooth(9))
        video.file.write(b"\0\0\x10\0moof and then nothing")
        raise OSError
    assert len(read_frames(partial_path(tmp_path / "a.mp4"))) == 9


def test_two_runs_do_not_write_one_video(tmp_path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 48, 32) as video:
        video.write(smooth(9))
        with pytest.raises(ValueError, match="another run"):
            VideoWriter(tmp_path / "a.mp4", 48, 32)
        video.write(smooth(3, 9))
    assert len(read_frames(tmp_path / "a.mp4")) == 12


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path) -> None:
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 48, 32):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="folder"):
        VideoWriter(tmp_path, 48, 32)
    with pytest.raises(ValueError, match="cannot be written"):
        VideoWriter(tmp_path / "file" / "a.mp4", 48, 32)
    with pytest.raises(ValueError, match=r"a\.avi"):
        VideoWriter(tmp_path / "a.avi", 48, 32)
    with pytest.raises(ValueError, match="47x32"):
        VideoWriter(tmp_path / "a.mp4", 47, 32)
    for shape in ((3, 48, 32, 3), (0, 32, 48, 3)):
        with (
            pytest.raises(ValueError, match="uint8"),
            VideoWriter(tmp_path / "a.mp4", 48, 32) as video,
        ):
            video.write(np.zeros(shape, np.uint8))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_files_that_are_no_videos_are_refused(tmp_path) -> None:
    (tmp_path / "a.mp4").write_text("hello")
    for path in (tmp_path / "a.mp4", tmp_path / "none.mp4"):
        with pytest.raises(ValueError, match="readable video"):
            read_metadata(path)


def test_a_damaged_file_is_refused(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 48, 32) as video:
        for _ in range(2):
            video.write(noise)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: -len(data) // 4])
    with pytest.raises(ValueError, match=r"a\.mp4 is damaged"):
        read_frames(tmp_path / "a.mp4")


def test_pixels_become_frames() -> None:
    pixels = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 5, 1, 1).expand(1, 3, 5, 1, 2)
    frames = to_frames(pixels)
    assert frames.shape == (5, 1, 2, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_contact_sheet_shows_the_frames_in_reading_order(tmp_path) -> None:
    frames = smooth(5)
    contact_sheet(frames, tmp_path / "sheet.png", columns=3, gap=2)
    sheet = decoded_picture(tmp_path / "sheet.png")
    assert sheet.shape == (2 * 34 + 2, 3 * 50 + 2, 3)
    assert np.array_equal(sheet[2:34, 2:50], frames[0])
    assert np.array_equal(sheet[36:68, 52:100], frames[4])
    assert (sheet[36:, 104:] == 255).all()


def test_a_contact_sheet_marks_its_rows(tmp_path) -> None:
    frames, marks = (
        smooth(6),
        [np.full((32, 9, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255))],
    )
    contact_sheet(frames, tmp_path / "sheet.png", columns=2, gap=2, marks=marks)
    sheet = decoded_picture(tmp_path / "sheet.png")
    assert sheet.shape == (3 * 34 + 2, 2 * 50 + 2 + 9 + 2, 3)
    for row, mark in enumerate([*marks, marks[0]]):
        bar = sheet[2 + 34 * row : 34 + 34 * row, 2:11]
        assert np.array_equal(bar, mark)
    assert np.array_equal(sheet[2:34, 13:61], frames[0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk to write to")
def test_a_full_disk_leaves_the_picture_before(tmp_path) -> None:
    path, partial = tmp_path / "a.png", tmp_path / ".a.png.partial"
    contact_sheet(smooth(2), path)
    before = path.read_bytes()
    partial.symlink_to("/dev/full")
    with pytest.raises(OSError):
        contact_sheet(smooth(3), path)
    assert path.read_bytes() == before
    partial.unlink()
    contact_sheet(smooth(3), path)
    assert decoded_picture(path).shape == (36, 2 + 8 * 50, 3)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(("count", "columns"), [(0, 3), (2, 0)])
def test_a_contact_sheet_of_nothing_is_refused(tmp_path, count, columns) -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet(smooth(count), tmp_path / "sheet.png", columns=columns)
