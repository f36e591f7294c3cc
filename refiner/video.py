"""Video files that grow by a chunk at a time, what they say of themselves, and contact sheets of them."""

import errno
import io
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# One fragment a chunk, no index at the end, times as they are given; custom metadata keys are kept.
FRAGMENTED = "empty_moov+default_base_moof+frag_custom+frag_discont+use_metadata_tags"
CONTAINER_KEYS = {"major_brand", "minor_version", "compatible_brands", "encoder"}  # the muxer's own
# The first of these that this PyAV was built with. No scene cuts: they would start a group of pictures within a chunk.
ENCODERS = {
    "libx264": {"preset": "medium", "crf": "16", "tune": "zerolatency", "sc_threshold": "0"},
    "mpeg4": {"qmin": "2", "qmax": "4", "sc_threshold": "1000000000"},
}


def to_frames(pixels_BCFHW: Tensor) -> np.ndarray:
    """Pixels [1, 3, F, H, W] in [-1, 1], clamped, as uint8 frames [F, H, W, 3] on the CPU."""
    levels = ((pixels_BCFHW[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def as_bytes(images_FHWC: Tensor) -> np.ndarray:
    """Frames [F, H, W, 3 or more] in [0, 1], clamped, as uint8 of three channels."""
    return to_frames(images_FHWC[..., :3].permute(3, 0, 1, 2)[None] * 2 - 1)


def partial_path(path: Path) -> Path:
    """Where a video lies until it is finished."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class VideoWriter:
    """Writes chunks of frames to NAME.partial.mp4, each one playable at once; a good end renames it to NAME.

    Whatever stood at NAME stays until then. Left by an exception, or killed, the partial file holds every chunk that
    was written. Raises ValueError or OSError when the output cannot be written, ValueError for a size or name that
    .mp4 does not take.
    """

    def __init__(
        self, path: Path, width: int, height: int, fps: int = 16, metadata: dict[str, str] | None = None
    ) -> None:
        self.path, self.partial = Path(path), partial_path(Path(path))
        self.size, self.fps, self.metadata = (width, height), fps, metadata or {}
        self.frames = self.chunks = self.finished = 0  # the last one in bytes
        check_output(self.path)
        if self.path.suffix != ".mp4":
            raise ValueError(f"video {self.path} is not an .mp4: give a name that ends in .mp4")
        if width % 2 or height % 2 or width < 2 or height < 2:
            raise ValueError(f"video size {width}x{height}: H.264 shares colour among 2x2 pixels, give even sides")
        self.codec = next(name for name in ENCODERS if name in av.codecs_available)
        self.file = open_exclusive(self.partial)

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frames: np.ndarray | Tensor) -> None:
        """Append a chunk of frames [F, H, W, 3], uint8 on the CPU, as one group of pictures, and flush it to disk."""
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.shape[1:] != (self.size[1], self.size[0], 3) or not len(frames):
            raise ValueError(
                f"frames are {frames.dtype} of {frames.shape}, this video takes uint8 of"
                f" ({self.size[1]}, {self.size[0]}, 3), one frame or more"
            )
        keep = (b"moof", b"mdat") if self.chunks else (b"ftyp", b"moov", b"moof", b"mdat")
        found = [(kind, box) for kind, box in boxes(self._encode(frames)) if kind in keep]
        # In one write, which leaves a kill next to no time to cut a fragment in two.
        data = b"".join(numbered(box, self.chunks + 1) if kind == b"moof" else box for kind, box in found)
        if self.file.write(data) < len(data):
            raise OSError(errno.ENOSPC, f"the disk is full, {self.partial} has {self.frames} frames")
        os.fsync(self.file.fileno())
        self.finished = self.file.tell()
        self.frames += len(frames)
        self.chunks += 1

    def __exit__(self, kind: type | None, *_: object) -> None:
        os.ftruncate(self.file.fileno(), self.finished)  # what a full disk or a signal cut off goes
        os.fsync(self.file.fileno())
        if fcntl is None:
            self.file.close()  # Windows renames no open file
        if kind is None and self.frames:
            os.replace(self.partial, self.path)
        elif not self.frames:
            self.partial.unlink()
        self.file.close()  # last, because it lets go of the lock

    def _encode(self, frames: np.ndarray) -> bytes:
        """The chunk as a fragmented mp4 of its own whose times go on where the last one ended."""
        buffer = io.BytesIO()
        options = {"movflags": FRAGMENTED, "avoid_negative_ts": "disabled"}
        with av.open(buffer, "w", format="mp4", options=options) as container:
            container.metadata.update(self.metadata)
            stream = container.add_stream(self.codec, rate=self.fps, options=ENCODERS[self.codec])
            stream.width, stream.height = self.size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = Fraction(1, self.fps)
            stream.codec_context.gop_size = len(frames)
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = self.frames + index
                frame.time_base = Fraction(1, self.fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return buffer.getvalue()


def open_exclusive(path: Path, instead: str = "give another --out, or wait") -> io.FileIO:
    """An empty file to write that no other run writes; ValueError, which says what to do instead, when one does."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115, the caller closes it
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"another run is writing {path}: {instead}") from None
    file.truncate(0)
    return file


def check_output(path: Path) -> None:
    """Raise ValueError unless a file can be made at `path`, whose folder is made if need be."""
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: give the name of a file")
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {path} cannot be written ({error.strerror}): give another folder") from error
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"output {path} cannot be written (no permission): give another name or folder")


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
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path} is not a readable video ({error.strerror})") from error
    if not container.streams.video:
        raise ValueError(f"{path} holds no video")
    return container


def read_metadata(path: Path) -> dict[str, str]:
    """What a video file says of itself: prompt, seed, preset, model and more, as `VideoWriter` was given them."""
    with _open_video(path) as container:
        return {name: value for name, value in container.metadata.items() if name not in CONTAINER_KEYS}


def count_frames(path: Path) -> int:
    """Frames in a video, without decoding them."""
    return video_size(path)[0]


def video_size(path: Path) -> tuple[int, int, int]:
    """(frames, width, height) of a video, without decoding it."""
    with _open_video(path) as container:
        stream = container.streams.video[0]
        return sum(1 for packet in container.demux(stream) if packet.size), stream.width, stream.height


def video_rate(path: Path) -> float:
    """Frames a second of a video, as it says."""
    with _open_video(path) as container:
        return float(container.streams.video[0].guessed_rate)


def read_frames(path: Path, every: int = 1) -> np.ndarray:
    """Frames [F, H, W, 3], uint8, of a video: each, or one in `every`. ValueError for a file that is damaged."""
    with _open_video(path) as container:
        decoded = enumerate(container.decode(video=0))
        try:
            return np.stack([frame.to_ndarray(format="rgb24") for index, frame in decoded if index % every == 0])
        except av.FFmpegError as error:
            raise ValueError(f"{path} is damaged ({error.strerror}): its writing was cut off, or the copy") from error


def contact_sheet(
    frames: Sequence[np.ndarray], path: Path, columns: int = 8, gap: int = 2, marks: Sequence[np.ndarray] = ()
) -> None:
    """A PNG with the frames [H, W, 3] side by side, in reading order on white.

    With `marks`, pictures [H, any, 3] of one width, each row begins with the next one of them, over and over.
    """
    if not len(frames) or columns < 1:
        raise ValueError(f"{len(frames)} frames in {columns} columns: a contact sheet takes at least one of each")
    height, width = frames[0].shape[:2]
    rows = -(-len(frames) // columns)
    wide = marks[0].shape[1] if len(marks) else 0
    margin = wide + gap if wide else 0
    sheet = np.full((rows * (height + gap) + gap, margin + columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), margin + gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = frame
        if margin:
            sheet[top : top + height, gap : gap + wide] = marks[row % len(marks)]
    write_png(sheet, path)


def write_png(image: np.ndarray, path: Path) -> None:
    """An RGB image [H, W, 3], uint8, as a PNG; a file that stood there is replaced whole."""
    path = Path(path)
    check_output(path)
    lines = np.concatenate((np.zeros((len(image), 1), np.uint8), image.reshape(len(image), -1)), axis=1)

    def piece(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + piece(b"IHDR", header)
        + piece(b"IDAT", zlib.compress(lines.tobytes()))
        + piece(b"IEND", b"")
    )
    os.replace(temporary, path)
