"""Write video files chunk by chunk, and read frames and metadata of videos."""

import errno
import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace
from torch import Tensor

from .estimate import check_room
from .files import INSTEAD, check_output, open_locked, partial_path, renames_open_files
from .fragments import FragmentEncoder
from .reading import check_regular

FINISHED = "faststart+use_metadata_tags"
CONTAINER_KEYS = {
    "major_brand",
    "minor_version",
    "compatible_brands",
    "encoder",
}  # written by the muxer
# Containers of their own data only: a playlist (HLS, DASH, concat, SDP) reads other files and
# hosts.
READABLE = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng",
    "protocol_whitelist": "file",
}
MOST_PIXELS = 1 << 26  # of a frame


def to_frames(pixels_BCFHW: Tensor) -> np.ndarray:
    """Convert pixels [1, 3, F, H, W] in [-1, 1] to uint8 frames [F, H, W, 3] on the CPU.

    Clamps to the range. Raises ValueError for pixels that are not finite.
    """
    check_pixels(pixels_BCFHW)
    levels = ((pixels_BCFHW[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def check_pixels(pixels: Tensor) -> None:
    """Raise ValueError for NaN and infinite values, which would become black."""
    if not pixels.isfinite().all():
        raise ValueError(
            "the VAE gave NaN or infinite pixels: decode in bf16 or fp32, or download its file"
            " again"
        )


def as_bytes(images_FHWC: Tensor) -> np.ndarray:
    """Convert frames [F, H, W, 3 or more] in [0, 1] to uint8 of three channels, clamped."""
    return to_frames(images_FHWC[..., :3].permute(3, 0, 1, 2)[None] * 2 - 1)


class VideoWriter:
    """Write chunks of frames to NAME.partial.mp4; leaving it without an error renames it to NAME.

    The partial file is playable after each chunk, and holds all of them after an exception or a
    kill. An existing file NAME stays until the end. The partial file of an earlier run is replaced
    after the first chunk, or, where this run `extends` that run, as soon as this one has as many
    frames. Unless `indexed`, the finished file stays as it was written, in fragments: finishing
    takes neither a copy nor memory, however long the video. Pixels are tagged BT.709, limited
    range. Raises ValueError or OSError when the output cannot be written, and ValueError for a
    size, rate or name that .mp4 does not allow.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: float | Fraction = 16,
        metadata: dict[str, str] | None = None,
        *,
        extends: bool = False,
        indexed: bool = True,
    ) -> None:
        self.indexed = indexed
        self.path, self.partial = Path(path), partial_path(Path(path))
        self.hidden = self.partial.with_name(f".{self.partial.name}")  # renamed to the partial file
        self.remuxed = self.path.with_name(f".{self.path.stem}.finished.mp4")  # renamed to NAME
        self.metadata = metadata or {}
        self.frames = self.chunks = 0
        self.finished = 0  # bytes of whole chunks
        check_output(self.path)
        if self.path.suffix != ".mp4":
            raise ValueError(f"video {self.path} is not an .mp4: give a name that ends in .mp4")
        self.encoder = FragmentEncoder(width, height, fps, self.metadata)
        self.shown = False  # whether this run's file has the partial file's name
        self.file = self._open()
        self.enough = max(1, playable_frames(self.partial)) if extends else 1

    def __enter__(self) -> "VideoWriter":
        return self

    def _open(self) -> io.FileIO:
        """Open the hidden file, emptied; ValueError while another run writes to either file."""
        file = open_locked(self.hidden, INSTEAD)
        try:
            if self.partial.exists():
                open_locked(self.partial, INSTEAD).close()
            file.truncate(0)
            self.remuxed.unlink(missing_ok=True)  # left by a run that was killed at its end
        except BaseException:
            file.close()
            raise
        return file

    def write(self, frames: np.ndarray | Tensor) -> None:
        """Append a chunk of frames [F, H, W, 3], uint8 on the CPU, and flush it to disk."""
        fragment = self.encoder.encode(frames)
        self._append(b"" if self.chunks else self.encoder.init, fragment)
        self.frames += len(frames)
        self.chunks += 1
        if not self.shown and self.frames >= self.enough:
            self._show()

    def _append(self, head: bytes, fragment: bytes) -> None:
        """Write a fragment, marked as free space until it is whole, so a kill damages nothing."""
        length, kind, rest = fragment[:4], fragment[4:8], fragment[8:]
        data = head + length + b"free" + rest
        self.file.seek(self.finished)
        if self.file.write(data) < len(data):
            state = f"nothing of {self.path} is written"
            if self.shown:
                state = f"{self.partial} has {self.frames} frames"
            raise OSError(errno.ENOSPC, f"the disk is full, {state}")
        os.fsync(self.file.fileno())
        self.file.seek(self.finished + len(head) + len(length))
        self.file.write(kind)
        os.fsync(self.file.fileno())
        self.finished = self.file.seek(0, os.SEEK_END)

    def _show(self) -> None:
        """Rename the hidden file to the partial file; the lock stays with it."""
        if renames_open_files():
            os.replace(self.hidden, self.partial)
        else:
            self.file.close()
            os.replace(self.hidden, self.partial)
            self.file = open_locked(self.partial, INSTEAD)
        self.shown = True

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.file.truncate(self.finished)  # drop a chunk cut off by a full disk or a signal
            os.fsync(self.file.fileno())
            if kind is None and self.frames:
                if not self.shown:
                    self._show()
                self._finish()
        finally:
            if not renames_open_files():
                self.file.close()
            if not self.shown:
                self.hidden.unlink(missing_ok=True)
            self.file.close()  # last, because it releases the lock

    def _finish(self) -> None:
        """Rename the file to NAME; first copy it into a plain one that begins with its index."""
        if not self.indexed:
            if not renames_open_files():
                self.file.close()
            os.replace(self.partial, self.path)
            return
        try:
            remux(self.partial, self.remuxed, self.metadata)
            with open(self.remuxed, "rb+") as file:
                os.fsync(file.fileno())
            if not renames_open_files():
                self.file.close()
            os.replace(self.remuxed, self.partial)
            os.replace(self.partial, self.path)
        except (OSError, av.FFmpegError) as error:
            reason = error.strerror or error
            raise OSError(
                f"{self.path} could not be finished ({reason}): {self.partial} holds all"
                f" {self.frames} frames and plays as it is; make room for a second copy and try"
                " again"
            ) from error
        finally:
            self.remuxed.unlink(missing_ok=True)


def remux(source: Path, target: Path, metadata: dict[str, str]) -> None:
    """Copy the packets of a video into a plain .mp4 whose index comes first."""
    with (
        av.open(str(source)) as container,
        av.open(str(target), "w", options={"movflags": FINISHED}) as copy,
    ):
        copy.metadata.update(metadata)
        stream = container.streams.video[0]
        copied = copy.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                copy.mux(packet)


def _open_video(path: Path) -> av.container.InputContainer:
    """Open a video for reading; ValueError for a playlist, which names other files."""
    try:
        check_regular(path)
        container = av.open(str(path.absolute()), options=READABLE, metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable video ({error.strerror}): give an .mp4, .webm or .mkv"
        ) from error
    try:
        _check_streams(container, path)
    except ValueError:
        container.close()
        raise
    return container


def _check_streams(container: av.container.InputContainer, path: Path) -> None:
    """Raise ValueError unless the file has a video stream of a known codec and plausible size."""
    if not container.streams.video:
        raise ValueError(f"{path} holds no video")
    codec = container.streams.video[0].codec_context
    if codec is None:
        raise ValueError(f"{path} holds a video of an unknown codec: convert it to H.264")
    if not 0 < codec.width * codec.height <= MOST_PIXELS:
        raise ValueError(
            f"{path} holds a video of {codec.width}x{codec.height} pixels: scale it down first"
        )


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata that a video was written with: prompt, seed, preset, model and so on."""
    with _open_video(path) as container:
        return {
            name: value for name, value in container.metadata.items() if name not in CONTAINER_KEYS
        }


def count_frames(path: Path) -> int:
    """Count the frames of a video without decoding them."""
    return video_size(path)[0]


def playable_frames(path: Path) -> int:
    """Count the frames of a video; 0 if it is missing, empty or damaged."""
    try:
        return count_frames(path)
    except ValueError:
        return 0


def video_size(path: Path) -> tuple[int, int, int]:
    """Return (frames, width, height) without decoding; ValueError for a damaged file."""
    with _open_video(path) as container:
        stream = container.streams.video[0]
        try:
            frames = sum(1 for packet in container.demux(stream) if packet.size)
            return frames, stream.width, stream.height
        except av.FFmpegError as error:
            raise _damaged(path, error) from error


def video_rate(path: Path) -> Fraction:
    """Return the frame rate that a video declares."""
    with _open_video(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise ValueError(f"{path} declares no frame rate: convert it to a plain .mp4")
    return rate


def read_frames(path: Path, every: int = 1) -> np.ndarray:
    """Read frames [F, H, W, 3], uint8, of a video: all of them, or one in `every`.

    Raises ValueError for a damaged file, and for frames that need more memory than is free.
    """
    count, width, height = video_size(path)
    nbytes = 2 * 3 * width * height  # a frame alone, and its copy in the array of all
    check_room(nbytes * -(-count // every), f"reading {path.name}", "use a shorter one")
    frames = []
    with _open_video(path) as container:
        try:
            for index, frame in enumerate(container.decode(video=0)):
                if (frame.width, frame.height) != (width, height):
                    raise ValueError(
                        f"{path} changes its size in frame {index}: convert it to a plain .mp4"
                    )
                if index % every == 0:
                    frames.append(to_rgb(frame))
        except av.FFmpegError as error:
            raise _damaged(path, error) from error
    if not frames:
        raise ValueError(f"{path} holds no frames: its writing ended before the first chunk")
    return np.stack(frames)


def _damaged(path: Path, error: av.FFmpegError) -> ValueError:
    """Make the error for a video that cannot be read to its end."""
    return ValueError(f"{path} is damaged ({error.strerror}): its writing was cut off, or the copy")


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Convert a decoded frame to RGB [H, W, 3], uint8, by its tagged matrix and range.

    Without a tag the matrix is BT.601.
    """
    matrix = frame.colorspace if frame.colorspace in set(Colorspace) else Colorspace.ITU601
    return frame.to_ndarray(
        format="rgb24", src_colorspace=matrix, src_color_range=frame.color_range or None
    )
