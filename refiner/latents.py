"""Latents of a video in a .safetensors file that grows chunk by chunk and is always readable.

Only whole chunks are read. The metadata `chunk_lengths`, like `1,3x6,2`, says how the frames are
cut: a killed run can leave an incomplete last chunk, and a run that continued from it would produce
another clip.
"""

import json
import math
import os
import re
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .estimate import check_room
from .files import partial_path
from .reading import open_regular
from .schedule import PRESETS, chunk_lengths, latent_frames

# [F, C, h, w], fp32, normalised; frame-major, so a new chunk is appended and nothing moves
KEY = "latents"
# bytes, padded with spaces; rewritten with the final shape when the file is closed
HEADER = 16384
LENGTHS = re.compile(r"([1-9]\d{0,8})(?:x([1-9]\d{0,8}))?")
MOST_CHUNKS = 999_999_999  # of a run of equal lengths
# raised when the header of a file of another kind is read
OTHER_FILE = (OSError, struct.error, ValueError, TypeError, KeyError, RecursionError)


class LatentWriter:
    """Append chunks to NAME.partial.safetensors; closing it without an error renames it to NAME.

    The file of a killed run lacks only its final shape, which `read_latents` does not need. `given`
    latents [1, C, F, h, w] are written first, so a run may continue from the partial file that it
    replaces. A chunk is on disk when `write` returns.
    """

    @staticmethod
    def check(metadata: dict[str, str]) -> None:
        """Raise ValueError for metadata that does not fit into the header."""
        size = len(json.dumps(metadata, ensure_ascii=False).encode())
        if size > HEADER - 256:
            raise ValueError(
                f"metadata of {size} bytes is too long for a latents file: shorten the prompt"
            )

    def __init__(
        self,
        path: Path,
        frame_shape: tuple[int, int, int],
        metadata: dict[str, str],
        given: Tensor | None = None,
    ) -> None:
        self.path = Path(path)
        self.partial = partial_path(self.path)
        self.frame_shape = frame_shape
        self.metadata = metadata
        self.frames = 0
        self.check(metadata)
        hidden = self.partial.with_name(f".{self.partial.name}")
        self.file = open(hidden, "wb")  # noqa: SIM115, closed below
        self.file.write(self._header())
        if given is not None:
            self.write(given)
        os.fsync(self.file.fileno())
        self.file.close()  # Windows cannot rename open files
        os.replace(hidden, self.partial)
        self.file = open(self.partial, "r+b", buffering=0)  # noqa: SIM115, closed by close()
        self.file.seek(0, os.SEEK_END)

    def write(self, latents_BCFhw: Tensor) -> None:
        """Append a chunk [1, C, F, h, w]; on a full disk (OSError) nothing of it is left."""
        frames = latents_BCFhw[0].transpose(0, 1).float().cpu().contiguous()
        end, rest = self.file.tell(), memoryview(frames.numpy().tobytes())
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            self.file.truncate(end)
            raise OSError(
                f"{self.partial}: a chunk could not be written ({error.strerror}): make room, then"
                " go on with --extend"
            ) from error
        self.frames += len(frames)

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(finished=kind is None)

    def close(self, finished: bool) -> Path:
        """Write the final header; rename a finished file, leave a stopped one partial."""
        nbytes = 4 * self.frames * math.prod(self.frame_shape)
        self.file.truncate(8 + HEADER + nbytes)  # cut off an interrupted write
        self.file.seek(0)
        self.file.write(self._header())
        os.fsync(self.file.fileno())
        self.file.close()
        if not finished:
            if not self.frames:
                self.partial.unlink()
            return self.partial
        os.replace(self.partial, self.path)
        return self.path

    def _header(self) -> bytes:
        shape = [self.frames, *self.frame_shape]
        end = 4 * torch.Size(shape).numel()
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
        text = json.dumps({"__metadata__": self.metadata, KEY: entry}, ensure_ascii=False).encode()
        return struct.pack("<Q", HEADER) + text.ljust(HEADER)


@dataclass(frozen=True, slots=True)
class LatentsInfo:
    """Contents of a latents file, by its header and size."""

    frames: int  # in whole chunks
    frame_shape: tuple[int, int, int]  # [C, h, w]
    metadata: dict[str, str]
    cut: bool  # whether an incomplete chunk follows


def inspect_latents(path: Path) -> LatentsInfo:
    """Read the header of a file by `LatentWriter`, be it finished, stopped or killed.

    Raises ValueError for another file.
    """
    try:
        with open_regular(path) as file:
            (written, *frame_shape), metadata = _read_header(file)
            nbytes = os.fstat(file.fileno()).st_size - file.tell()
        frame_bytes = 4 * math.prod(frame_shape)
        frames = whole_frames(metadata, nbytes // frame_bytes, written)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a file written by --save-latents") from None
    except OTHER_FILE:
        raise ValueError(
            f"{path} is not a latents file: give one written by --save-latents"
        ) from None
    return LatentsInfo(frames, tuple(frame_shape), metadata, nbytes > frames * frame_bytes)


def count_latents(path: Path) -> int:
    """Count the latent frames in whole chunks of a file by `LatentWriter`."""
    return inspect_latents(path).frames


def read_latents(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Read latents [1, C, F, h, w] and metadata of a file by `LatentWriter`.

    Warns when it drops the incomplete chunk of a killed run. Raises ValueError for a file without a
    whole chunk, and for a file of another kind.
    """
    info = inspect_latents(path)
    if not info.frames:
        raise ValueError(f"{path} holds no finished chunk: start again without it")
    if info.cut:
        warnings.warn(
            f"{path} ends in an unfinished chunk: {info.frames} latent frames are kept",
            stacklevel=2,
        )
    count = info.frames * math.prod(info.frame_shape)
    check_room(2 * 4 * count, f"reading {path.name}", "go on from a shorter file")
    with open_regular(path) as file:
        file.seek(8 + HEADER)
        body = bytearray(file.read(4 * count))
    flat = torch.frombuffer(body, dtype=torch.float32, count=count)
    return flat.reshape(1, info.frames, *info.frame_shape).transpose(1, 2), info.metadata


def whole_frames(metadata: Mapping[str, str], frames: int, written: int) -> int:
    """Count frames in whole chunks, of `frames` in a file whose header counts `written`.

    Files without `chunk_lengths` (version 0.1) are cut as their preset cuts them; without a preset
    every frame counts. Raises ValueError for malformed lengths.
    """
    if frames == written:  # closed without an error, or nothing was appended
        return frames
    whole = 0
    for length, count in _planned_chunks(metadata, written if written < frames else 0, frames):
        fitting = min(count, (frames - whole) // length)
        whole += fitting * length
        if fitting < count:
            break
    return whole


def _planned_chunks(
    metadata: Mapping[str, str], given: int, frames: int
) -> Sequence[tuple[int, int]]:
    """Return (length, count) of the chunks of a run, from its metadata."""
    if "chunk_lengths" in metadata:
        return parse_lengths(metadata["chunk_lengths"])
    preset = PRESETS.get(metadata.get("preset", ""))
    if preset is None:
        return [(1, frames)]
    new = latent_frames(int(metadata["frames"])) - given
    lengths = chunk_lengths(max(0, new), preset.chunk, preset.first_alone and not given)
    return [(length, 1) for length in ([given] if given else []) + lengths]


def format_lengths(lengths: Iterable[int], endless: bool = False) -> str:
    """Format chunk lengths for metadata: 3, 3, 3, 1 become `3x3,1`.

    With `endless` the last one repeats as often as the format allows.
    """
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    if endless:
        runs[-1] = (runs[-1][0], MOST_CHUNKS)
    return ",".join(f"{length}x{count}" if count > 1 else f"{length}" for length, count in runs)


def parse_lengths(text: str) -> list[tuple[int, int]]:
    """Parse each run of equal chunk lengths as (length, count); ValueError for another text."""
    runs = [LENGTHS.fullmatch(run) for run in text.split(",")]
    if not all(runs):
        raise ValueError(f"chunk lengths {text[:40]!r}: expected a list like 1,3x6,2")
    return [(int(run[1]), int(run[2] or 1)) for run in runs]


def first_lengths(text: str, frames: int) -> list[int]:
    """Return the lengths of as many chunks of a `chunk_lengths` text as fit in `frames`."""
    lengths: list[int] = []
    for length, count in parse_lengths(text):
        fitting = min(count, (frames - sum(lengths)) // length)
        lengths += [length] * fitting
        if fitting < count:
            break
    return lengths


def is_latents(path: Path) -> bool:
    """Whether a file was written by `LatentWriter`; reads its header only."""
    try:
        inspect_latents(path)
    except ValueError:
        return False
    return True


def _read_header(file: BinaryIO) -> tuple[tuple[int, int, int, int], dict[str, str]]:
    """Read the shape [F, C, h, w] as last written, and the metadata.

    Raises one of OTHER_FILE for a file of another kind.
    """
    (length,) = struct.unpack("<Q", file.read(8))
    if length != HEADER:
        raise ValueError
    header = json.loads(file.read(length))
    shape, metadata = tuple(header[KEY]["shape"]), header.get("__metadata__", {})
    if (
        len(shape) != 4
        or any(type(side) is not int for side in shape)
        or min(shape[1:]) < 1
        or shape[0] < 0
    ):
        raise ValueError
    if not all(isinstance(value, str) for value in dict(metadata).values()):
        raise ValueError
    return shape, metadata
