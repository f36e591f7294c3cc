"""What a LoRA's file says of its scale beside its tensors: PEFT's adapter_config.json, and
trainers' metadata."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..reading import CONFIG_BYTES, read_json

CONFIG = "adapter_config.json"
LARGEST = 1e30  # of an alpha
ADAPTER = "adapter_model"  # PEFT's name of the file beside it
PREFIXES = (
    "transformer.",
    "unet.",
    "",
)  # of keys in metadata, as diffusers has them for each of its models
NESTED = "lora_adapter_metadata"  # diffusers' own key, whose value is JSON


@dataclass(frozen=True, slots=True)
class StatedScale:
    """alpha of all modules and of some, by PEFT's patterns; scale is alpha / rank, or alpha / √rank
    (rsLoRA)."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def scale(self, module: str, rank: int) -> float:
        """The factor of up · down; 1 where nothing is stated."""
        matching = (
            alpha
            for key, alpha in self.patterns.items()
            if re.search(rf"(^|\.){re.escape(key)}$", module)
        )
        alpha = next(matching, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def stated_scale(path: Path, metadata: Mapping[str, str]) -> StatedScale | None:
    """What is stated of a LoRA file's scale; None where nothing is. `path` is the file, or the
    folder that holds it.

    Raises ValueError (without the file's name) for what is not understood, or where two places say
    different things.
    """
    places = {CONFIG: _config_beside(path), "its metadata": _of_metadata(metadata)}
    found = {place: _read(said, place) for place, said in places.items() if said is not None}
    stated = list(found.values())
    if any(other != stated[0] for other in stated[1:]):
        raise ValueError(f"has another alpha in {' than in '.join(found)}: correct one of them")
    return stated[0] if stated else None


def _config_beside(path: Path) -> dict[str, Any] | None:
    """The adapter_config.json of a PEFT folder or of a file in it."""
    if not path.is_dir() and path.stem != ADAPTER:
        return None
    config = (path if path.is_dir() else path.parent) / CONFIG
    try:
        return _mapping(read_json(config, CONFIG_BYTES), CONFIG)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has an {CONFIG} that is not a JSON object: copy it again") from error


def _of_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's options from metadata, as diffusers, SimpleTuner and kohya's scripts write them."""
    said: dict[str, Any] = dict(metadata)
    if NESTED in metadata:
        try:
            said |= _mapping(json.loads(metadata[NESTED]), NESTED)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"has a metadata {NESTED} that is not a JSON object: its scale is not known"
            ) from error
    for prefix in PREFIXES:
        options = {
            key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)
        }
        if "lora_alpha" in options:
            return options
    return {"lora_alpha": said["ss_network_alpha"]} if "ss_network_alpha" in said else None


def _read(said: Mapping[str, Any], place: str) -> StatedScale:
    if _flag(said.get("use_dora"), place):
        raise ValueError(f"is a DoRA, as {place} says: only plain LoRA files are read")
    patterns = _mapping(_parsed(said.get("alpha_pattern") or {}), place)
    return StatedScale(
        _number(said.get("lora_alpha"), place),
        {str(key): _number(alpha, place) for key, alpha in patterns.items()},
        _flag(said.get("use_rslora"), place),
    )


def _parsed(value: Any) -> Any:
    """A value, of JSON where it is a text, as metadata holds nothing else."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _number(value: Any, place: str) -> float | None:
    parsed = _parsed(value)
    if parsed is None:
        return None
    if (
        isinstance(parsed, bool)
        or not isinstance(parsed, (int, float))
        or not abs(parsed) <= LARGEST
    ):
        raise ValueError(
            f"has an alpha of {str(value)[:40]!r} in {place}, which is no number: correct it"
        )
    return float(parsed)


def _flag(value: Any, place: str) -> bool:
    parsed = _parsed(value.lower() if isinstance(value, str) else value)
    if parsed not in (None, True, False):
        raise ValueError(
            f"has {str(value)[:40]!r} in {place} where true or false is expected: correct it"
        )
    return bool(parsed)


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"has a {type(value).__name__} in {place} where a table is expected")
    return value
