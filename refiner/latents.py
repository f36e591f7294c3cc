"""Latents of a video in a .safetensors file that grows by a chunk at a time and is readable whenever it stops."""

import json
import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .video import partial_path

KEY = "latents"  # [F, C, h, w], fp32, normalised; frame-major, so that a chunk is appended and nothing is moved
HEADER = 16384  # bytes, padded with spaces: written again with the final shape when the file is closed
OTHER_FILE = (OSError, struct.error, ValueError, TypeError, KeyError, RecursionError)  # what reading its header raises


class LatentWriter:
    """Appends chunks to NAME.partial.safetensors; closing it well renames it to NAME.

    A file that was cut off by a kill lacks only its final shape, which `read_latents` does without. `given` latents
    [1, C, F, h, w] stand in it from the start, so a run may go on from the partial file that it is about to write.
    """

    @staticmethod
    def check(metadata: dict[str, str]) -> None:
        """Raise ValueError when metadata does not fit into the header."""
        size = len(json.dumps(metadata, ensure_ascii=False).encode())
        if size > HEADER - 256:
            raise ValueError(f"metadata of {size} bytes is too long for a latents file: shorten the prompt")

    def __init__(
        self, path: Path, frame_shape: tuple[int, int, int], metadata: dict[str, str], given: Tensor | None = None
    ) -> None:
        self.path = Path(path)
        self.partial = partial_path(self.path)
        self.frame_shape = frame_shape
        self.metadata = metadata
        self.frames = 0
        self.check(metadata)
        begun = self.partial.with_name(f".{self.partial.name}")
        self.file = open(begun, "wb")  # noqa: SIM115, closed below
        self.file.write(self._header())
        if given is not None:
            self.write(given)
        self.file.close()  # Windows renames no open file
        os.replace(begun, self.partial)
        self.file = open(self.partial, "r+b", buffering=0)  # noqa: SIM115, closed by close()
        self.file.seek(0, os.SEEK_END)

    def write(self, latents_BCFhw: Tensor) -> None:
        """Append a chunk [1, C, F, h, w], whole or, where the disk is full (OSError), not at all."""
        frames = latents_BCFhw[0].transpose(0, 1).float().cpu().contiguous()
        end, rest = self.file.tell(), memoryview(frames.numpy().tobytes())
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.file.truncate(end)
            raise OSError(
                f"{self.partial}: a chunk could not be written ({error.strerror}): make room, then go on with --extend"
            ) from error
        self.frames += len(frames)

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(finished=kind is None)

    def close(self, finished: bool) -> Path:
        """Write the final header; a finished file takes its name, a stopped one stays partial."""
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


def read_latents(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Latents [1, C, F, h, w] and metadata of a file by `LatentWriter`, finished, stopped or cut off by a kill.

    Raises ValueError for any other file.
    """
    try:
        with open(path, "rb") as file:
            frame, metadata = _read_header(file)
            body = bytearray(file.read())
    except OTHER_FILE:
        raise ValueError(f"{path} is not a latents file: give one written by --save-latents") from None
    size = math.prod(frame)
    whole = len(body) // (4 * size)  # a chunk cut off in the middle of a frame loses that frame
    if not whole:
        raise ValueError(f"{path} holds no finished chunk: start again without it")
    flat = torch.frombuffer(body, dtype=torch.float32, count=whole * size)
    return flat.reshape(1, whole, *frame).transpose(1, 2), metadata


def is_latents(path: Path) -> bool:
    """Whether a file is one by `LatentWriter`, from its header alone."""
    try:
        with open(path, "rb") as file:
            _read_header(file)
    except OTHER_FILE:
        return False
    return True


def _read_header(file: BinaryIO) -> tuple[tuple[int, int, int], dict[str, str]]:
    """Shape [C, h, w] of a frame, and metadata; raises one of several errors for a file of another kind."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length != HEADER:
        raise ValueError
    header = json.loads(file.read(length))
    frame, metadata = tuple(header[KEY]["shape"][1:]), header.get("__metadata__", {})
    if len(frame) != 3 or any(type(side) is not int or side < 1 for side in frame):
        raise ValueError
    if not all(isinstance(value, str) for value in dict(metadata).values()):
        raise ValueError
    return frame, metadata
