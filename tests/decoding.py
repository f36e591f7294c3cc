"""Decode video and picture files with code that the writers do not share."""

import shutil
import subprocess
from pathlib import Path

import av
import numpy as np

FFMPEG = shutil.which("ffmpeg")


def decoded(path: Path) -> np.ndarray:
    """Return every frame [F, H, W, 3]; assert that none is damaged, missing or mistimed."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = sum(1 for packet in container.demux(stream) if packet.size)
        rate = stream.average_rate
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == packets, f"{path}: {len(frames)} of {packets} frames decode"
    assert not any(frame.is_corrupt for frame in frames)
    assert [frame.pts * frame.time_base for frame in frames] == [
        index / rate for index in range(len(frames))
    ]
    if FFMPEG:
        command = [FFMPEG, "-v", "warning", "-xerror", "-i", str(path), "-f", "null", "-"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (0, ""), f"{path}: {ran.stderr}"
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def decoded_picture(path: Path) -> np.ndarray:
    """Return a picture [H, W, 3], read by ffmpeg's decoders."""
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")
