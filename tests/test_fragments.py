"""Fragments of a video: in order they are the file that VideoWriter writes."""

import io
from pathlib import Path

import av
import numpy as np
import pytest

from autorefiner.refiner.fragments import FragmentEncoder, codec_string
from autorefiner.refiner.video import VideoWriter

LENGTHS = (9, 12, 4)


def chunks() -> list[np.ndarray]:
    """Return chunks of fixed frames whose brightness counts them."""
    levels = np.arange(sum(LENGTHS), dtype=np.uint8)[:, None, None, None]
    frames = np.broadcast_to(40 + 4 * levels, (sum(LENGTHS), 32, 48, 3))
    return np.split(frames, np.cumsum(LENGTHS)[:-1])


def encoded() -> tuple[FragmentEncoder, list[bytes]]:
    encoder = FragmentEncoder(48, 32, 24, {"seed": "7"})
    return encoder, [encoder.encode(frames) for frames in chunks()]


def levels(data: bytes) -> list[int]:
    """Return the mean level of each frame of an mp4."""
    with av.open(io.BytesIO(data)) as container:
        return [round(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode()]


def test_the_writer_writes_the_encoders_bytes(tmp_path: Path) -> None:
    encoder, fragments = encoded()
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 48, 32, 24, {"seed": "7"}, indexed=False) as video:
        for frames in chunks():
            video.write(frames)
    assert path.read_bytes() == encoder.init + b"".join(fragments)


def test_the_init_segment_and_any_later_fragment_play() -> None:
    encoder, fragments = encoded()
    whole = levels(encoder.init + b"".join(fragments))
    assert len(whole) == encoder.frames == sum(LENGTHS)
    assert levels(encoder.init + fragments[1]) == whole[9:21]


def test_the_codec_is_that_of_the_stream() -> None:
    encoder, fragments = encoded()
    with av.open(io.BytesIO(encoder.init + fragments[0])) as container:
        context = container.streams.video[0].codec_context
        assert context.profile == "High"
        level = bytes(context.extradata)[3]
    assert codec_string(encoder.init) == f"avc1.6400{level:02x}"


def test_without_x264_there_is_no_codec_for_a_page(monkeypatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    encoder, _ = encoded()
    assert encoder.codec == "mpeg4" and encoder.init and codec_string(encoder.init) is None


def test_frames_of_another_size_are_refused() -> None:
    encoder, _ = encoded()
    with pytest.raises(ValueError, match="uint8"):
        encoder.encode(np.zeros((4, 48, 32, 3), np.uint8))
