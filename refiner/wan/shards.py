"""Folders of weights: an index of shards, shards without one, diffusers' pipelines, and what
config.json says."""

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
NETWORK, SECOND_NETWORK = (
    "transformer",
    "transformer_2",
)  # diffusers' folders of a pipeline's networks
PIPELINE, CONFIG = "model_index.json", "config.json"


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The files that one model was cut into."""

    folder: Path
    files: tuple[str, ...]
    expected: frozenset[str]  # tensors that an index names; empty without one


def shards_in(folder: Path) -> ShardSet | Path:
    """The shards of a folder, or the one file in it that holds its weights.

    Raises ValueError in one line when there is none, more than one set, or a shard is missing.
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
    paths = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern))]
    inside = [str(path.relative_to(folder)) for path in paths if _looks_like_weights(path)]
    if any(path.suffix == ".distcp" for path in folder.iterdir()):
        raise ValueError(
            f"{folder} is a distributed checkpoint (.distcp): convert it with"
            " `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt`"
        )
    hint = (
        f"pass one of its files ({', '.join(inside[:3])})"
        if inside
        else "pass a .safetensors or .pt file"
    )
    raise ValueError(f"{folder} is a folder without an index of shards: {hint}")


def _known_in(folder: Path) -> Path | None:
    return next((folder / name for name in KNOWN_IN_FOLDERS if is_file(folder / name)), None)


def shard_set_name(name: str) -> tuple[str, int, str] | None:
    """(stem, count, suffix) of a shard's file name; None for any other name."""
    match = SHARD.fullmatch(name)
    return (match["stem"], int(match["count"]), match["suffix"]) if match else None


def siblings(path: Path) -> ShardSet:
    """All shards of the set that one file belongs to, by their names; ValueError when some are
    missing."""
    wanted = shard_set_name(path.name)
    names = {}
    for other in path.parent.iterdir():
        if shard_set_name(other.name) == wanted:
            names[int(SHARD.fullmatch(other.name)["number"])] = other.name
    count = wanted[1]
    if len(names) < count:
        missing = next(number for number in range(1, count + 1) if number not in names)
        match = SHARD.fullmatch(path.name)
        name = path.name.replace(
            f"-{match['number']}-of-", f"-{missing:0{len(match['number'])}}-of-"
        )
        raise ValueError(
            f"{path} is one of {count} shards, and {name} is not beside it: download the others, too"
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
    """Raise ValueError where the index names a tensor that no shard holds."""
    if lost := sorted(shards.expected.difference(names)):
        raise ValueError(
            f"{shards.folder} lacks {len(lost)} tensors of its index ({lost[0][:80]}): download it again"
        )


def is_file(path: Path) -> bool:
    """Whether a path is a regular file; False too for a name that no file system takes."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _looks_like_weights(path: Path) -> bool:
    return path.suffix in SUFFIXES or path.name in KNOWN_IN_FOLDERS


def network_folder(path: Path) -> Path:
    """The folder that holds a model's file or shards."""
    return path if path.is_dir() else path.parent


def json_beside(path: Path) -> dict[str, Any]:
    """A JSON object beside the weights; empty where there is none that can be read."""
    try:
        value = read_json(path, JSON_BYTES)
    except (OSError, ValueError):
        value = None
    return value if isinstance(value, dict) else {}


def class_beside(path: Path) -> str:
    """The class that diffusers' config.json names for the weights of a folder; "" where there is
    none."""
    folder = network_folder(path)
    in_folder = (
        path.is_dir() or path.name in KNOWN_IN_FOLDERS or shard_set_name(path.name) is not None
    )
    return str(json_beside(folder / CONFIG).get("_class_name", "")) if in_folder else ""


def is_expert(path: Path) -> bool:
    """Whether weights are one of the two networks of a diffusers pipeline, as Wan2.2-A14B has
    them."""
    folder = network_folder(path)
    if folder.name not in (NETWORK, SECOND_NETWORK):
        return False
    other = folder.parent / (SECOND_NETWORK if folder.name == NETWORK else NETWORK)
    index = json_beside(folder.parent / PIPELINE)
    entry = index.get(SECOND_NETWORK)
    named = isinstance(entry, list) and any(entry)
    return (
        folder.name == SECOND_NETWORK
        or other.is_dir()
        or named
        or index.get("boundary_ratio") is not None
    )
