"""Weight files: opened without running code, listed without reading data, written atomically.

A .pt/.pth goes through torch's weights-only unpickler and is mapped, so that only tensors in use
are read; of a .safetensors only the header is read. A model in shards counts as one file.
"""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..reading import open_regular
from .groups import FLAT, Groups, group_tensors, split_roles
from .shards import ShardSet, check_expected, is_file, shard_set_name, shards_in, siblings
from .torch_file import load_torch, plain_tensors, too_large

__all__ = ["FLAT", "WeightFile", "choose_dtype", "open_weights", "save_safetensors"]

MOST_HEADER = 16 << 20  # bytes of a safetensors header; 825 tensors need 0.1 MB
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class WeightFile:
    """An open file or folder of weights.

    `groups` maps a top key (`generator_ema`, ...; `flat` when there is none) to {stored name:
    tensor}. Tensors of a safetensors file are on the meta device until `read`. `others` are the top
    keys without tensors.
    """

    path: Path
    container: str
    groups: dict[str, dict[str, Tensor]]
    others: tuple[str, ...]
    metadata: dict[str, str]
    readers: dict[str, "_Reader"]

    def read(self, group: str, name: str) -> Tensor:
        """Read one tensor as stored, on the CPU, mapped where the container allows it."""
        reader = self.readers.get(name)
        return self.groups[group][name] if reader is None else reader.read(name)


def open_weights(path: Path | str) -> WeightFile:
    """Open a .pt/.pth/.bin, a .safetensors, a folder of shards, or one shard with its siblings.

    Content decides and not the suffix. Raises ValueError in one line for anything else: missing,
    empty, text, damaged, or a pickle that would run code.
    """
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        try:
            inside = shards_in(path)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}): check its permissions"
            ) from error
        if isinstance(inside, ShardSet):
            return _open_shards(inside.folder, inside)
        return _open_file(inside)
    if shard_set_name(path.name) and is_file(path):
        return _open_shards(path, siblings(path))
    return _open_file(path)


def _open_file(path: Path) -> WeightFile:
    try:
        with open_regular(path) as file:
            head = file.read(64)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be opened ({error.strerror}): check the path and its permissions"
        ) from error
    if head[8:9] == b"{":  # first, as the eight bytes before it are a length and can be anything
        if MOST_HEADER < int.from_bytes(head[:8], "little") <= path.stat().st_size:
            raise ValueError(
                f"{path} has a header of over {MOST_HEADER >> 20} MiB: save it without its metadata"
            )
        return _open_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _open_pickle(path, zipped=head.startswith(b"PK"))
    raise ValueError(f"{path} {_unknown_content(head)}")


def _unknown_content(head: bytes) -> str:
    if not head:
        return "is empty (0 bytes): download it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer and not the weights themselves: run `git lfs pull` in its folder"
        )
    if head.startswith(b"GGUF"):
        return "is a GGUF file, which is quantised: pass the .safetensors or .pt of the model"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return (
            "is a text file and not weights: pass a .safetensors or .pt"
            " (a failed download often leaves a web page)"
        )
    return "is neither a .safetensors nor a torch .pt file: pass one of these"


class _Reader:
    """Data of a safetensors file, mapped at the first read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _file(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self.path} {too_large(self.path)}") from error

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


def _open_safetensors(path: Path) -> WeightFile:
    try:
        # "numpy" reads only the header; "pt" lets torch map the whole file, which needs as much
        # free memory.
        header = safe_open(path, framework="numpy")
        tensors = {}
        for name in header.keys():  # noqa: SIM118 - safe_open is not a mapping
            entry = header.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(entry.get_dtype())
            if dtype is None:
                raise ValueError(
                    f"{path} holds {entry.get_dtype()} tensors ({name}), an unknown type:"
                    " pass a bf16 file"
                )
            tensors[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
        metadata = dict(header.metadata() or {})
    # RuntimeError and TypeError come from sizes beyond 64 bits.
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({_line(error)}): download it again"
        ) from error
    readers = dict.fromkeys(tensors, _Reader(path))
    return WeightFile(path, "safetensors", split_roles({FLAT: tensors}), (), metadata, readers)


def _open_pickle(path: Path, *, zipped: bool) -> WeightFile:
    if path.suffix == ".safetensors":  # torch.load trusts this suffix
        raise ValueError(f"{path} is a torch .pt file in spite of its name: rename it to .pt")
    try:
        content = load_torch(path, mmap=zipped)
        if not isinstance(content, Mapping):
            raise ValueError(
                f"holds a {type(content).__name__} and not a state dict: pass a model's weights"
            )
        groups, others = group_tensors(content)
        groups = _plain_groups(groups, path.stat().st_size)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    if not groups:
        keys = ", ".join(map(str, list(content)[:4])) or "nothing"
        raise ValueError(f"{path} holds no tensors, only {keys}: pass a model's weights")
    return WeightFile(path, "pt", groups, others, {}, {})


def _plain_groups(groups: Groups, nbytes: int) -> Groups:
    """Check that all groups hold plain tensors; drop stray values at the top of the file.

    `nbytes` is the size of the file.
    """
    plain: Groups = {}
    for name, tensors in groups.items():
        try:
            plain[name] = plain_tensors(tensors, nbytes)
        except ValueError:
            if name != FLAT or not plain:
                raise
    return plain


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open_shards(path: Path, shards: ShardSet) -> WeightFile:
    tensors, readers, metadata = {}, {}, {}
    for name in shards.files:
        shard = _open_file(shards.folder / name)
        for group in shard.groups.values():
            if double := next((key for key in group if key in tensors), None):
                raise ValueError(
                    f"{shards.folder} holds {double[:80]} in two shards:"
                    " it is damaged, download it again"
                )
            tensors |= group
        readers |= shard.readers
        metadata = shard.metadata | metadata
    check_expected(shards, tensors)
    container = f"{len(shards.files)} shards"
    return WeightFile(path, container, split_roles({FLAT: tensors}), (), metadata, readers)


def choose_dtype(
    wanted: torch.dtype | None, tensors: Mapping[str, Tensor], path: Path
) -> torch.dtype:
    """Return the dtype to run in: wanted, else stored (of most bytes), but bf16 for fp8.

    Raises ValueError when the wanted dtype is too narrow, or a tensor is not floating point and
    therefore quantised.
    """
    if wanted is not None and (not wanted.is_floating_point or wanted.itemsize < 2):
        raise ValueError(f"dtype {wanted} cannot run a network: use bfloat16, float16 or float32")
    nbytes: dict[torch.dtype, int] = {}
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{path} has {name} in {tensor.dtype}, so it is quantised:"
                " pass the bf16 or fp16 file"
            )
        nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
    most = max(nbytes, key=lambda dtype: nbytes[dtype])
    return wanted or (torch.bfloat16 if most.itemsize < 2 else most)


def save_safetensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a .safetensors atomically: an old file at `path` stays until the new one is on disk.

    Raises ValueError for metadata values that are not strings, or a missing folder, and OSError for
    a full disk.
    """
    path = Path(path)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(
                f"metadata {key!r} is a {type(value).__name__}, but the format holds strings:"
                " use json.dumps"
            )
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder: make it before saving {path.name}")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # The library creates files that only their owner can read: restore the user's default mode.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(whole, temporary, metadata=dict(metadata))
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # also for a full disk
        raise OSError(
            f"{path} could not be written ({_line(error)}): make room, or save elsewhere"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)  # left over when writing failed
