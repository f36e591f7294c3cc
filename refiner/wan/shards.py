"""Folders of weights: shards with or without an index, diffusers' pipelines, config.json."""

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reading import JSON_BYTES, read_json

KNOWN_IN_FOLDERS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})(?P<suffix>\.(?:safetensors|pt|pth|bin))"
)
# Folders of the networks in diffusers' pipelines.
NETWORK = "transformer"
SECOND_NETWORK = "transformer_2"
PIPELINE = "model_index.json"
CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class ShardSet:
    """Files that one model was split into."""

    folder: Path
    files: tuple[str, ...]
    expected: frozenset[str]  # tensors that an index names; empty without one


def shards_in(folder: Path) -> ShardSet | Path:
    """Return the shards of a folder, or the one file with its weights.

    Raises ValueError in one line when there are none, several sets, or a missing shard.
    """
    known = _known_in(folder)
    if known is None and is_file(folder / PIPELINE) and (folder / NETWORK).is_dir():
        folder = folder / NETWORK
        known = _known_in(folder)
    if known is not None:
        return _read_index(known) if known.suffix == ".json" else known
    names = [path.name for path in sorted(folder.iterdir()) if SHARD.fullmatch(path.name)]
    sets = {shard_set_name(name) for name in names}
    if len(sets) == 1:
        return siblings(folder / names[0])
    raise ValueError(f"{folder} {_no_weights(folder)}")


def _no_weights(folder: Path) -> str:
    if any(path.suffix == ".distcp" for path in folder.iterdir()):
        return (
            "is a distributed checkpoint (.distcp): convert it with"
            " `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt`"
        )
    paths = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern))]
    inside = [str(path.relative_to(folder)) for path in paths if _looks_like_weights(path)]
    hint = "pass a .safetensors or .pt file"
    if inside:
        hint = f"pass one of its files ({', '.join(inside[:3])})"
    return f"is a folder without an index of shards: {hint}"


def _known_in(folder: Path) -> Path | None:
    return next((folder / name for name in KNOWN_IN_FOLDERS if is_file(folder / name)), None)


def shard_set_name(name: str) -> tuple[str, int, str] | None:
    """Return (stem, count, suffix) of a shard's file name; None for any other name."""
    match = SHARD.fullmatch(name)
    return (match["stem"], int(match["count"]), match["suffix"]) if match else None


def siblings(path: Path) -> ShardSet:
    """Return all shards of the set that one file belongs to; ValueError when some are missing."""
    shard_set = shard_set_name(path.name)
    names = {}
    for other in path.parent.iterdir():
        if shard_set_name(other.name) == shard_set:
            names[int(SHARD.fullmatch(other.name)["number"])] = other.name
    count = shard_set[1]
    if len(names) < count:
        missing = next(number for number in range(1, count + 1) if number not in names)
        digits = SHARD.fullmatch(path.name)["number"]
        name = path.name.replace(f"-{digits}-of-", f"-{missing:0{len(digits)}}-of-")
        raise ValueError(
            f"{path} is one of {count} shards, and {name} is not beside it:"
            " download the others, too"
        )
    return ShardSet(path.parent, tuple(names[number] for number in sorted(names)), frozenset())


def _read_index(index: Path) -> ShardSet:
    try:
        names = read_json(index, JSON_BYTES)["weight_map"]
        shards = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of shards (no `weight_map`): download it again"
        ) from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            name = str(shard)[:80]
            raise ValueError(
                f"{index} names a shard outside its folder ({name}): refused, download it again"
            )
        if not is_file(index.parent / shard):
            raise ValueError(
                f"{index.parent} lacks {shard[:80]}, one of its {len(shards)} shards: download it"
            )
    return ShardSet(index.parent, tuple(shards), frozenset(names))


def check_expected(shards: ShardSet, names: Sequence[str]) -> None:
    """Raise ValueError where the index names a tensor that no shard has."""
    if missing := sorted(shards.expected.difference(names)):
        raise ValueError(
            f"{shards.folder} lacks {len(missing)} tensors of its index ({missing[0][:80]}):"
            " download it again"
        )


def is_file(path: Path) -> bool:
    """Check that a path is a regular file; False also for a name that is no valid path."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _looks_like_weights(path: Path) -> bool:
    return path.suffix in SUFFIXES or path.name in KNOWN_IN_FOLDERS


def network_folder(path: Path) -> Path:
    """Return the folder of a model's file or shards."""
    return path if path.is_dir() else path.parent


def json_beside(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one where there is none or it is not readable."""
    try:
        value = read_json(path, JSON_BYTES)
    except (OSError, ValueError):
        value = None
    return value if isinstance(value, dict) else {}


def class_beside(path: Path) -> str:
    """Return the class that diffusers' config.json beside the weights names, else ""."""
    in_folder = path.name in KNOWN_IN_FOLDERS or shard_set_name(path.name) is not None
    if not path.is_dir() and not in_folder:
        return ""
    return str(json_beside(network_folder(path) / CONFIG).get("_class_name", ""))


def is_expert(path: Path) -> bool:
    """Check for one of the two networks of a diffusers pipeline, like Wan2.2-A14B's."""
    folder = network_folder(path)
    if folder.name not in (NETWORK, SECOND_NETWORK):
        return False
    other = folder.parent / (SECOND_NETWORK if folder.name == NETWORK else NETWORK)
    index = json_beside(folder.parent / PIPELINE)
    entry = index.get(SECOND_NETWORK)
    has_second = isinstance(entry, list) and any(entry)
    has_boundary = index.get("boundary_ratio") is not None
    return folder.name == SECOND_NETWORK or other.is_dir() or has_second or has_boundary
