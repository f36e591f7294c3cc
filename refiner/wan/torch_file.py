"""Torch's .pt files, read without running code and with bounded memory.

`torch.load(weights_only=True)` runs no code but trusts every size: a compressed member or a long
pickle may cost many times its size in memory, and a tensor may be sparse, without data, or a view
that repeats one number.
"""

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..reading import check_regular, open_regular

MOST_PICKLE = 2 << 20  # bytes of a zipped pickle; a model of 825 tensors, saved twice, has 0.4 MB
MOST_READS = 2 << 20  # reads of the unpickler, for a file that is one pickle
MOST_DIRECTORY = 8 << 20  # bytes of the zip directory
SHARED = 2  # bytes of tensors per byte of the file: tied weights are saved once
ZIPPED = b"PK\x03\x04"


def load_torch(path: Path, *, mmap: bool = False, verify: bool = False) -> object:
    """Unpickle a .pt of tensors and plain values; `mmap` leaves data in the file where possible.

    `verify` compares the checksum that torch writes with each tensor, as reading alone does not.
    Raises ValueError (without the file's name) for a file that could run code, is damaged, or costs
    more memory than it should.
    """
    check_regular(path)
    try:
        with open_regular(path) as file:
            if file.read(len(ZIPPED)) != ZIPPED:
                file.seek(0)
                return torch.load(_CountedReads(file), map_location="cpu", weights_only=True)
            file.seek(0)
            check_archive(file, verify)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (MemoryError, TooMuch):
        raise
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise ValueError(_refusal(path, error)) from error


class TooMuch(ValueError):
    """Error for a file that would cost more memory than a model's file does."""


def check_archive(file: io.BufferedReader, verify: bool) -> None:
    """Raise TooMuch for a zip with compressed members, or a pickle longer than a model's.

    With `verify`, raise ValueError for a member whose checksum is wrong.
    """
    with zipfile.ZipFile(_BoundedReads(file)) as archive:
        _check_members(archive.infolist())
        if verify and (damaged := archive.testzip()):
            raise ValueError(f"{damaged} is damaged")


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise TooMuch(
                f"is a zip with compressed members ({member.filename}), which torch never writes:"
                " refused"
            )
        if member.filename.endswith(".pkl") and member.file_size > MOST_PICKLE:
            size = member.file_size / 1e6
            raise TooMuch(
                f"has a pickle of {size:.1f} MB, and a model's has less than 2: pass a .safetensors"
            )


class _BoundedReads(io.BufferedIOBase):
    """A file for zipfile, which reads the zip directory whole: at most MOST_DIRECTORY bytes."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(MOST_DIRECTORY + 1 if size < 0 else min(size, MOST_DIRECTORY + 1))
        if len(content) > MOST_DIRECTORY:
            raise TooMuch(
                f"has a zip directory of over {MOST_DIRECTORY >> 20} MiB, and a model's has less:"
                " refused"
            )
        return content


class _CountedReads:
    """A file for torch's unpickler, which reads each instruction by a call.

    It has no file descriptor, so torch cannot map it.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file
        self.reads = 0
        self.seek, self.tell, self.readinto = file.seek, file.tell, file.readinto

    def read(self, size: int = -1) -> bytes:
        self._count()
        return self.file.read(size)

    def readline(self) -> bytes:
        self._count()
        return self.file.readline()

    def _count(self) -> None:
        self.reads += 1
        if self.reads > MOST_READS:
            raise TooMuch(
                f"has a pickle of over {MOST_READS} instructions, and a model's has fewer: refused"
            )


def plain_tensors(content: object, nbytes: int) -> dict[str, Tensor]:
    """Return the tensors of a state dict, detached; none for any other content.

    `nbytes` is the size of the file. Raises ValueError (without the file's name) for a tensor that
    is no plain array of numbers in memory, and for tensors larger than the file can hold.
    """
    if not isinstance(content, Mapping):
        return {}
    tensors = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            if odd := _oddity(value):
                raise ValueError(
                    f"holds {name} as {odd}, expected a plain tensor:"
                    " save its values with .contiguous()"
                )
            tensors[name] = value.detach()
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > SHARED * nbytes:
        raise ValueError(
            "holds tensors of more bytes than the file has, views of the same data:"
            " pass a .safetensors"
        )
    return tensors


def _oddity(tensor: Tensor) -> str | None:
    """Describe a tensor that is not plain; None for a plain one."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return "a sparse tensor"
    if tensor.device.type != "cpu":
        return f"a tensor on {tensor.device.type}"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.dtype.is_complex or tensor.dtype is torch.bool:
        return f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "a view that repeats its data"
    return None


def _refusal(path: Path, error: Exception) -> str:
    imported = re.search(r"GLOBAL ([\w.]+)", str(error))
    if imported:
        return (
            f"holds more than tensors ({imported[1]}) and could run code when opened, so it is"
            " refused: ask its author for a .safetensors"
        )
    if "unable to mmap" in str(error):
        return too_large(path)
    return (
        "is no whole torch file of tensors (cut short, damaged, or another pickle):"
        " download it again"
    )


def too_large(path: Path) -> str:
    """Explain that a file cannot be mapped."""
    size = path.stat().st_size / 1e9
    return (
        f"is {size:.1f} GB and this machine's memory cannot map that much:"
        " add swap, or allow overcommit"
    )
