"""Video files that grow by a chunk at a time, and what they say of themselves."""

import errno
import io
import math
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from .estimate import check_room
from .files import INSTEAD, check_output, open_locked, partial_path, renames_open_files
from .reading import check_regular

# One fragment a chunk, no index at the end, times as they are given; custom metadata keys are kept.
FRAGMENTED = "empty_moov+default_base_moof+frag_custom+frag_discont+use_metadata_tags"
FINISHED = "faststart+use_metadata_tags"
CONTAINER_KEYS = {"major_brand", "minor_version", "compatible_brands", "encoder"}  # the muxer's own
# The first of these that this PyAV was built with. No scene cuts: they would start a group of
# pictures within a chunk.
ENCODERS = {
    "libx264": {"preset": "medium", "crf": "16", "tune": "zerolatency", "sc_threshold": "0"},
    "mpeg4": {"qmin": "2", "qmax": "4", "sc_threshold": "1000000000"},
}
# Every chunk has an encoder of its own and all share the first one's parameter sets, so nothing may
# depend on a chunk's length. This is the longest group of pictures that mpeg4 takes.
GROUP = 600
LONGEST_SIDE = 16384  # that libx264 takes
MPEG4_RATE = 65535  # its largest numerator
# What a video may be: containers of their own data. A playlist (HLS, DASH, concat, SDP) reads other
# files and hosts.
READABLE = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng",
    "protocol_whitelist": "file",
}
MOST_PIXELS = 1 << 26  # of a frame
# of primaries, transfer and matrix alike, in H.273's numbers; mpeg4 says it in the container alone
BT709 = 1


def exact_rate(fps: float | Fraction) -> Fraction:
    """Frames a second as the fraction that is meant: 23.976 is 2997/125, 24000/1001 as a float is
    itself."""
    given = fps if isinstance(fps, Fraction) else float(fps)  # also of numpy
    rate = Fraction(given).limit_denominator(1001) if 0 < given < math.inf else 0
    if not rate:
        raise ValueError(f"{fps} frames a second: give a number above 0, like 16 or 23.976")
    return rate


def to_frames(pixels_BCFHW: Tensor) -> np.ndarray:
    """Pixels [1, 3, F, H, W] in [-1, 1], clamped, as uint8 frames [F, H, W, 3] on the CPU.

    Raises ValueError for pixels that are not finite.
    """
    check_pixels(pixels_BCFHW)
    levels = ((pixels_BCFHW[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def check_pixels(pixels: Tensor) -> None:
    """Raise ValueError for NaN and infinite values, which would be black."""
    if not pixels.isfinite().all():
        raise ValueError(
            "the VAE gave NaN or infinite pixels: decode in bf16 or fp32, or download its file again"
        )


def as_bytes(images_FHWC: Tensor) -> np.ndarray:
    """Frames [F, H, W, 3 or more] in [0, 1], clamped, as uint8 of three channels."""
    return to_frames(images_FHWC[..., :3].permute(3, 0, 1, 2)[None] * 2 - 1)


class VideoWriter:
    """Writes chunks of frames to NAME.partial.mp4, each one playable at once; a good end makes NAME
    of it.

    Whatever stood at NAME stays until then. Left by an exception, or killed at any moment, the
    partial file holds every chunk that was written. A partial file of an earlier run is replaced by
    the first chunk; where this run `extends` that one, as soon as this one holds as many frames.
    Pixels are BT.709 in limited range, and say so. Raises ValueError or OSError when the output
    cannot be written, ValueError for a size, rate or name that .mp4 does not take.
    """

    def __init__(
        self, path: Path, width: int, height: int, fps: float | Fraction = 16,
        metadata: dict[str, str] | None = None, *, extends: bool = False,
    ) -> None:  # fmt: skip
        self.path, self.partial = Path(path), partial_path(Path(path))
        self.hidden = self.partial.with_name(
            f".{self.partial.name}"
        )  # until it takes the partial file's name
        self.remuxed = self.path.with_name(
            f".{self.path.stem}.finished.mp4"
        )  # until it takes the name
        self.size, self.rate, self.metadata = (width, height), exact_rate(fps), metadata or {}
        self.frames = self.chunks = self.finished = 0  # the last one in bytes
        self.parameters: bytes | None = None  # of the first chunk's encoder
        check_output(self.path)
        if self.path.suffix != ".mp4":
            raise ValueError(f"video {self.path} is not an .mp4: give a name that ends in .mp4")
        if width % 2 or height % 2 or width < 2 or height < 2:
            raise ValueError(
                f"video size {width}x{height}: H.264 shares colour among 2x2 pixels, give even sides"
            )
        if max(width, height) > LONGEST_SIDE:
            raise ValueError(
                f"video size {width}x{height}: H.264 takes sides of at most {LONGEST_SIDE}, scale it down"
            )
        self.codec = next(name for name in ENCODERS if name in av.codecs_available)
        if self.codec == "mpeg4" and self.rate.numerator > MPEG4_RATE:
            raise ValueError(
                f"{self.rate} frames a second: mpeg4 takes no such fraction, give a whole number"
            )
        self.shown = False  # whether this run's file has the partial file's name
        self.file = self._open()
        self.enough = max(1, playable_frames(self.partial)) if extends else 1

    def __enter__(self) -> "VideoWriter":
        return self

    def _open(self) -> io.FileIO:
        """Open the hidden file, empty, unless another run writes that or the partial file."""
        file = open_locked(self.hidden, INSTEAD)
        try:
            if self.partial.exists():
                open_locked(self.partial, INSTEAD).close()
            file.truncate(0)
            self.remuxed.unlink(missing_ok=True)  # of a run that was killed at its end
        except BaseException:
            file.close()
            raise
        return file

    def write(self, frames: np.ndarray | Tensor) -> None:
        """Append a chunk of frames [F, H, W, 3], uint8 on the CPU, as one group of pictures, and
        flush it to disk."""
        frames = np.asarray(frames)
        if (
            frames.dtype != np.uint8
            or frames.shape[1:] != (self.size[1], self.size[0], 3)
            or not len(frames)
        ):
            raise ValueError(
                f"frames are {frames.dtype} of {frames.shape}, this video takes uint8 of"
                f" ({self.size[1]}, {self.size[0]}, 3), one frame or more"
            )
        parts = dict(boxes(self._encode(frames)))
        head = b"" if self.chunks else parts[b"ftyp"] + parts[b"moov"]
        self._append(head, numbered(parts[b"moof"], self.chunks + 1) + parts[b"mdat"])
        self.frames += len(frames)
        self.chunks += 1
        if not self.shown and self.frames >= self.enough:
            self._show()

    def _append(self, head: bytes, fragment: bytes) -> None:
        """Put a fragment on disk. It counts as free space until it is whole, so a kill leaves no
        damaged file."""
        length, kind, rest = fragment[:4], fragment[4:8], fragment[8:]
        data = head + length + b"free" + rest
        self.file.seek(self.finished)
        if self.file.write(data) < len(data):
            left = (
                f"{self.partial} has {self.frames} frames"
                if self.shown
                else f"nothing of {self.path} is written"
            )
            raise OSError(errno.ENOSPC, f"the disk is full, {left}")
        os.fsync(self.file.fileno())
        self.file.seek(self.finished + len(head) + len(length))
        self.file.write(kind)
        os.fsync(self.file.fileno())
        self.finished = self.file.seek(0, os.SEEK_END)

    def _show(self) -> None:
        """Let the hidden file take the partial file's name; the lock goes with it."""
        if renames_open_files():
            os.replace(self.hidden, self.partial)
        else:
            self.file.close()
            os.replace(self.hidden, self.partial)
            self.file = open_locked(self.partial, INSTEAD)
        self.shown = True

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.file.truncate(self.finished)  # what a full disk or a signal cut off goes
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
            self.file.close()  # last, because it lets go of the lock

    def _finish(self) -> None:
        """Copy the fragments into a plain file that starts with its index, which takes the name."""
        finished = self.remuxed
        try:
            remux(self.partial, finished, self.metadata)
            with open(finished, "rb+") as file:
                os.fsync(file.fileno())
            if not renames_open_files():
                self.file.close()
            os.replace(finished, self.partial)
            os.replace(self.partial, self.path)
        except (OSError, av.FFmpegError) as error:
            reason = error.strerror or error
            raise OSError(
                f"{self.path} could not be finished ({reason}): {self.partial} holds all {self.frames} frames and plays"
                " as it is; make room for a second copy and try again"
            ) from error
        finally:
            finished.unlink(missing_ok=True)

    def _encode(self, frames: np.ndarray) -> bytes:
        """The chunk as a fragmented mp4 of its own whose times go on where the last one ended."""
        buffer = io.BytesIO()
        options = {"movflags": FRAGMENTED, "avoid_negative_ts": "disabled"}
        with av.open(buffer, "w", format="mp4", options=options) as container:
            container.metadata.update(self.metadata)
            stream = container.add_stream(self.codec, rate=self.rate, options=ENCODERS[self.codec])
            stream.width, stream.height = self.size
            stream.pix_fmt = "yuv420p"
            encoder = stream.codec_context
            encoder.time_base = 1 / self.rate
            encoder.gop_size = GROUP
            encoder.color_primaries = encoder.color_trc = encoder.colorspace = BT709
            encoder.color_range = ColorRange.MPEG
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                )
                frame.pts = self.frames + index
                frame.time_base = 1 / self.rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            parameters = bytes(encoder.extradata or b"")
        self.parameters = self.parameters or parameters
        if parameters != self.parameters:
            raise RuntimeError(
                f"{self.codec} encodes chunk {self.chunks + 1} with other parameters than the first"
            )
        return buffer.getvalue()


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


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The top-level boxes of an mp4: (kind, whole box)."""
    start = 0
    while start < len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start : start + length]
        start += length


def numbered(moof: bytes, sequence: int) -> bytes:
    """A moof box with this sequence number: every chunk's own muxer starts at 1."""
    place = moof.index(b"mfhd") + 8  # behind the name, version and flags
    return moof[:place] + struct.pack(">I", sequence) + moof[place + 4 :]


def _open_video(path: Path) -> av.container.InputContainer:
    """Open a video to read. A playlist, which names other files, is none."""
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
    """Raise ValueError unless there is a video stream that can be decoded, of a size that videos
    have."""
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
    """What a video file says of itself: prompt, seed, preset, model and more, as `VideoWriter` was
    given them."""
    with _open_video(path) as container:
        return {
            name: value for name, value in container.metadata.items() if name not in CONTAINER_KEYS
        }


def count_frames(path: Path) -> int:
    """Frames in a video, without decoding them."""
    return video_size(path)[0]


def playable_frames(path: Path) -> int:
    """Frames in a video that may be absent, empty or damaged: 0 then."""
    try:
        return count_frames(path)
    except ValueError:
        return 0


def video_size(path: Path) -> tuple[int, int, int]:
    """(frames, width, height) of a video, without decoding it; ValueError for a file that is
    damaged."""
    with _open_video(path) as container:
        stream = container.streams.video[0]
        try:
            return (
                sum(1 for packet in container.demux(stream) if packet.size),
                stream.width,
                stream.height,
            )
        except av.FFmpegError as error:
            raise ValueError(
                f"{path} is damaged ({error.strerror}): its writing was cut off, or the copy"
            ) from error


def video_rate(path: Path) -> Fraction:
    """Frames a second of a video, as it says."""
    with _open_video(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise ValueError(f"{path} says no frame rate: convert it to a plain .mp4")
    return rate


def read_frames(path: Path, every: int = 1) -> np.ndarray:
    """Frames [F, H, W, 3], uint8, of a video: each, or one in `every`.

    ValueError for a file that is damaged, or whose frames take more memory than is free.
    """
    count, width, height = video_size(path)
    nbytes = (
        2 * 3 * width * height
    )  # of a frame that is read: alone, and then in one array with the others
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
            raise ValueError(
                f"{path} is damaged ({error.strerror}): its writing was cut off, or the copy"
            ) from error
    if not frames:
        raise ValueError(f"{path} holds no frames: its writing ended before the first chunk")
    return np.stack(frames)


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as RGB [H, W, 3], uint8, by the matrix and range that it is tagged with;
    BT.601 without a tag."""
    matrix = frame.colorspace if frame.colorspace in set(Colorspace) else Colorspace.ITU601
    return frame.to_ndarray(
        format="rgb24", src_colorspace=matrix, src_color_range=frame.color_range or None
    )
