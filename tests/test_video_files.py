"""Written files as other programs read them: frame times, colours, duration, and one lock."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from autorefiner.refiner import files, fragments, video
from autorefiner.refiner.files import open_exclusive, partial_path
from autorefiner.refiner.fragments import boxes, exact_rate
from autorefiner.refiner.video import VideoWriter, playable_frames, read_frames, video_rate

from decoding import decoded

PATTERNS = [
    (1, 4, 4, 4), (1, 8, 8), (1, 12, 12), (9, 12, 12), (9, 12, 12, 4), (1,), (1, 1), (1,) * 9,
    (2, 1, 7), (12, 1, 12), (1, 4, 1), (5, 4, 4), (3, 300, 2),
]  # fmt: skip


def moving(frames: int, width: int, height: int, start: int = 0) -> np.ndarray:
    """Return frames that identify themselves: a bright bar on a slope, moving one step a frame."""
    image = np.zeros((frames, height, width, 3), np.uint8)
    image[..., 1] = np.linspace(30, 200, width, dtype=np.uint8)
    for index in range(frames):
        place = 2 * ((start + index) % (height // 2))
        image[index, place : place + 2] = (200, 60, 30)
    return image


def write(
    path: Path, pattern: tuple[int, ...], width: int = 48, height: int = 32, **options
) -> np.ndarray:
    """Write chunks of the given sizes; return the frames."""
    whole = moving(sum(pattern), width, height)
    with VideoWriter(path, width, height, **options) as writer:
        for length in pattern:
            writer.write(whole[writer.frames : writer.frames + length])
    return whole


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_of_chunks_decodes_whole(tmp_path, pattern) -> None:
    whole = write(tmp_path / "a.mp4", pattern)
    frames = decoded(tmp_path / "a.mp4")
    assert frames.shape == whole.shape
    assert np.abs(frames.astype(int) - whole).mean() < 8
    order = [
        int(np.abs(whole.astype(int) - frame).mean((1, 2, 3)).argmin()) % 16
        for frame in frames[:32]
    ]
    assert order == [index % 16 for index in range(len(order))]


@pytest.mark.parametrize("size", [(16, 16), (18, 50), (64, 64), (480, 832), (1280, 720)], ids=str)
def test_every_size_decodes_whole_while_it_grows_and_at_its_end(tmp_path, size) -> None:
    path, done = tmp_path / "a.mp4", 0
    with VideoWriter(path, *size) as writer:
        for length in (1, 4, 3):
            writer.write(moving(length, *size, start=done))
            done += length
            assert len(decoded(partial_path(path))) == done
    assert len(decoded(path)) == done


@pytest.mark.parametrize("pattern", [(1, 4, 4), (9, 12), (1, 1, 1)])
def test_the_other_encoder_decodes_whole(tmp_path, monkeypatch, pattern) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    whole = write(tmp_path / "a.mp4", pattern)
    assert np.abs(decoded(tmp_path / "a.mp4").astype(int) - whole).mean() < 8


def test_a_rate_that_the_other_encoder_does_not_take_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(ValueError, match="mpeg4"):
        VideoWriter(tmp_path / "a.mp4", 48, 32, Fraction(120000, 1001))
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a.mp4", (4, 4), fps=Fraction(60000, 1001))
    assert len(decoded(tmp_path / "a.mp4")) == 8


def test_what_a_kill_left_of_a_remuxed_file_goes_with_the_next_run(tmp_path) -> None:
    (tmp_path / ".a.finished.mp4").write_bytes(b"half")
    write(tmp_path / "a.mp4", (4,))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_parameters_that_change_between_chunks_are_no_video(tmp_path, monkeypatch) -> None:
    """As if an encoder were opened per chunk length: all chunks are decoded with the first's."""
    with (
        pytest.raises(RuntimeError, match="parameters"),
        VideoWriter(tmp_path / "a.mp4", 48, 32) as writer,
    ):
        monkeypatch.setattr(fragments, "GROUP", 1)
        writer.write(moving(1, 48, 32))
        monkeypatch.setattr(fragments, "GROUP", 600)
        writer.write(moving(4, 48, 32))
    assert len(decoded(partial_path(tmp_path / "a.mp4"))) == 1


def test_a_fragment_that_a_kill_cut_off_hides_no_chunk(tmp_path) -> None:
    """Wherever the second chunk's write ends, the first one plays and nothing is damaged."""
    path, torn = tmp_path / "a.mp4", tmp_path / "torn.mp4"
    with VideoWriter(path, 48, 32) as writer:
        writer.write(moving(4, 48, 32))
        whole = writer.finished
        writer.write(moving(4, 48, 32, start=4))
        data = bytearray(partial_path(path).read_bytes())
    start = data.index(b"moof", whole)
    data[start : start + 4] = b"free"  # not on disk completely
    for end in (
        whole + 1,
        whole + 7,
        whole + 9,
        start + 60,
        (whole + len(data)) // 2,
        len(data) - 1,
        len(data),
    ):
        torn.write_bytes(data[:end])
        assert playable_frames(torn) == len(read_frames(torn)) == 4
    assert len(decoded(torn)) == 4


def test_a_prompt_may_say_what_boxes_are_called(tmp_path) -> None:
    said = {"prompt": "moof mdat moov ftyp mfhd free"}
    whole = write(tmp_path / "a.mp4", (1, 4), metadata=said)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["prompt"] == said["prompt"]
    assert len(decoded(tmp_path / "a.mp4")) == len(whole)
    with (
        pytest.raises(KeyboardInterrupt),
        VideoWriter(tmp_path / "b.mp4", 48, 32, metadata=said) as writer,
    ):
        for start in (0, 4):
            writer.write(moving(4, 48, 32, start))
        raise KeyboardInterrupt
    assert len(decoded(tmp_path / "b.partial.mp4")) == 8


def luma_and_chroma(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        planes = [
            np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            for plane in frame.planes
        ]
    return tuple(planes)


@pytest.mark.parametrize("size", [(64, 64), (832, 480), (1280, 720)], ids=str)
def test_colours_are_bt709_in_limited_range_and_say_so(tmp_path, size) -> None:
    """Y = 16 + 219 y, Cb = 128 + 224 (B − y) / 1.8556, Cr with R and 1.5748.

    y = 0.2126 R + 0.7152 G + 0.0722 B.
    """
    width, height = size
    colours = np.array(
        [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 60, 30)], np.uint8
    )
    image = colours[np.arange(width) * len(colours) // width][None].repeat(height, 0)
    with VideoWriter(tmp_path / "a.mp4", width, height) as writer:
        writer.write(image[None].repeat(2, 0))
    planes = luma_and_chroma(tmp_path / "a.mp4")
    for index, colour in enumerate(colours):
        column = (2 * index + 1) * width // (2 * len(colours))
        red, green, blue = colour / 255
        y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        expected = (16 + 219 * y, 128 + 224 * (blue - y) / 1.8556, 128 + 224 * (red - y) / 1.5748)
        for plane, value in zip(planes, expected, strict=True):
            place = column * plane.shape[1] // width
            assert abs(int(plane[plane.shape[0] // 2, place]) - value) <= 3, (colour, value)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
    assert tags == (1, 1, 1, 1)
    assert b"colrnclx\0\1\0\1\0\1" in (tmp_path / "a.mp4").read_bytes()
    places = [(2 * index + 1) * width // (2 * len(colours)) for index in range(len(colours))]
    assert (
        np.abs(read_frames(tmp_path / "a.mp4")[0, height // 2, places].astype(int) - colours).max()
        <= 6
    )


def test_the_stream_itself_says_its_colours(tmp_path) -> None:
    """Some players read the colours from the H.264 stream."""
    write(tmp_path / "a.mp4", (4,))
    with av.open(str(tmp_path / "a.mp4")) as container:
        packet = next(container.demux(video=0))
        raw = av.CodecContext.create("h264", "r")
        raw.extradata = container.streams.video[0].codec_context.extradata
        frame = (raw.decode(packet) + raw.decode(None))[0]
    assert (frame.colorspace, frame.color_range) == (1, 1)


def test_a_file_without_tags_is_read_as_bt601(tmp_path) -> None:
    path = tmp_path / "old.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        picture = av.VideoFrame.from_ndarray(
            np.full((64, 64, 3), (200, 60, 30), np.uint8), format="rgb24"
        )
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    assert np.abs(read_frames(path)[0, 32, 32].astype(int) - (200, 60, 30)).max() <= 3


def box_names(data: bytes) -> list[bytes]:
    return [kind for kind, _ in boxes(data)]


@pytest.mark.parametrize("fps", [16, 23.976, Fraction(30000, 1001)])
def test_a_finished_file_is_plain_and_starts_with_its_index(tmp_path, fps) -> None:
    write(tmp_path / "a.mp4", (1, 4, 4), fps=fps, metadata={"seed": "7"})
    data = (tmp_path / "a.mp4").read_bytes()
    names = box_names(data)
    assert b"moof" not in names
    assert names.index(b"moov") < names.index(b"mdat")
    moov = dict(boxes(data))[b"moov"]
    header = moov[moov.index(b"mvhd") + 4 :]
    timescale, duration = (int.from_bytes(header[place : place + 4], "big") for place in (12, 16))
    assert duration / timescale == pytest.approx(9 / float(fps), abs=2 / timescale)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 9
        assert container.metadata["seed"] == "7"


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (16, Fraction(16)), (23.976, Fraction(2997, 125)), (24000 / 1001, Fraction(24000, 1001)),
        (12.5, Fraction(25, 2)), (29.97, Fraction(2997, 100)),
        (Fraction(30000, 1001), Fraction(30000, 1001)), (1.4, Fraction(7, 5)), (120, 120),
        (np.float32(23.976), Fraction(2997, 125)), (np.int64(24), 24),
    ],
)  # fmt: skip
def test_frames_come_at_the_rate_that_was_asked_for(tmp_path, fps, rate) -> None:
    assert exact_rate(fps) == rate
    write(tmp_path / "a.mp4", (1, 4, 4), fps=fps)
    assert video_rate(tmp_path / "a.mp4") == rate
    assert len(decoded(tmp_path / "a.mp4")) == 9  # exactly at index / rate


@pytest.mark.parametrize("fps", [0, -1, 0.0, 1e-9, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(tmp_path, fps) -> None:
    with pytest.raises(ValueError, match="frames a second"):
        VideoWriter(tmp_path / "a.mp4", 48, 32, fps)
    assert not list(tmp_path.iterdir())


def test_a_run_that_extends_leaves_what_was_there_until_it_has_as_much(tmp_path) -> None:
    path, partial = tmp_path / "a.mp4", partial_path(tmp_path / "a.mp4")
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 48, 32) as writer:
        writer.write(moving(9, 48, 32))
        raise KeyboardInterrupt
    before = partial.read_bytes()
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 48, 32, extends=True) as writer:
        for start in (0, 4):
            writer.write(moving(4, 48, 32, start))
            assert partial.read_bytes() == before
        raise KeyboardInterrupt
    assert partial.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [partial.name]
    with VideoWriter(path, 48, 32, extends=True) as writer:
        writer.write(moving(8, 48, 32))
        assert partial.read_bytes() == before
        writer.write(moving(4, 48, 32, 8))
        assert len(decoded(partial)) == 12
    assert len(decoded(path)) == 12
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("extends", [False, True])
@pytest.mark.parametrize("left", [b"", b"\0\0\0\x08moov", b"no video"])
def test_a_partial_file_without_a_chunk_counts_as_absent(tmp_path, extends, left) -> None:
    path = tmp_path / "a.mp4"
    partial_path(path).write_bytes(left)
    assert playable_frames(partial_path(path)) == 0
    with VideoWriter(path, 48, 32, extends=extends) as writer:
        writer.write(moving(4, 48, 32))
        assert len(decoded(partial_path(path))) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_new_run_leaves_an_earlier_one_until_its_first_chunk(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 48, 32) as writer:
        writer.write(moving(9, 48, 32))
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 48, 32):
        raise KeyboardInterrupt
    assert len(decoded(partial_path(path))) == 9


STEPS = ("os.fsync", "os.replace", "av.open")


@pytest.mark.parametrize("number", range(1, 4))
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_loses_no_chunk_that_was_written(tmp_path, step, number) -> None:
    """The process kills itself at its n-th call after the first chunk; the next run finishes."""
    path = tmp_path / "a.mp4"
    script = (
        "import os, signal, sys, av, numpy as np\n"
        "from autorefiner.refiner import video\n"
        f"module, name = {step.split('.')!r}\n"
        "left, real = [int(sys.argv[2])], getattr(sys.modules[module], name)\n"
        "def step(*arguments, **options):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments, **options)\n"
        "with video.VideoWriter(sys.argv[1], 48, 32) as writer:\n"
        "    writer.write(np.zeros((4, 32, 48, 3), np.uint8))\n"
        "    setattr(sys.modules[module], name, step)\n"
        "    writer.write(np.zeros((4, 32, 48, 3), np.uint8))\n"
    )
    run = [sys.executable, "-c", script, str(path), str(number)]
    ended = subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
    assert ended in (-signal.SIGKILL, 0)
    left = path if path.exists() else partial_path(path)
    assert len(decoded(left)) in (4, 8)
    if not path.exists():
        write(path, (4, 8), extends=True)
    assert len(decoded(path)) in (8, 12)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_disk_that_is_full_at_the_end_leaves_the_partial_file(tmp_path, monkeypatch) -> None:
    def full(source: Path, target: Path, metadata: dict[str, str]) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video, "remux", full)
    with pytest.raises(OSError, match=r"a\.mp4"):
        write(tmp_path / "a.mp4", (1, 4))
    assert [file.name for file in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert len(decoded(tmp_path / "a.partial.mp4")) == 5


@pytest.mark.parametrize("shown", [False, True])
def test_two_runs_never_write_one_video(tmp_path, shown) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 48, 32) as writer:
        if shown:
            writer.write(moving(4, 48, 32))
        for extends in (False, True):
            with pytest.raises(ValueError, match="another run"):
                VideoWriter(path, 48, 32, extends=extends)
        writer.write(moving(4, 48, 32, 4 * shown))
    assert len(decoded(path)) == 4 + 4 * shown


@pytest.mark.skipif(files.fcntl is None, reason="no locks here")
@pytest.mark.parametrize("number", sorted(files.NO_LOCKS))
def test_a_file_system_without_locks_is_written_to_and_said(tmp_path, monkeypatch, number) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="locks"):
        write(tmp_path / "a.mp4", (1, 4))
    assert len(decoded(tmp_path / "a.mp4")) == 5
    with pytest.warns(UserWarning, match="locks"), open_exclusive(tmp_path / "lock"):
        pass


@pytest.mark.skipif(files.fcntl is None, reason="no locks here")
def test_an_error_of_a_lock_names_the_file(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with warnings.catch_warnings(), pytest.raises(OSError, match=r"a\.partial\.mp4"):
        warnings.simplefilter("error")
        VideoWriter(tmp_path / "a.mp4", 48, 32)
