"""Scale of a LoRA as stated outside its tensors: PEFT's adapter_config.json, trainers' metadata."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..reading import CONFIG_BYTES, read_json

CONFIG = "adapter_config.json"
LARGEST_ALPHA = 1e30
ADAPTER = "adapter_model"  # stem of PEFT's weight file, which lies beside its config
PREFIXES = ("transformer.", "unet.", "")  # of metadata keys; diffusers has one for each model
NESTED = "lora_adapter_metadata"  # diffusers' key, whose value is JSON


@dataclass(frozen=True, slots=True)
class StatedScale:
    """Alpha by default and by PEFT's patterns; scale is alpha / rank, for rsLoRA alpha / √rank."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of up · down; 1 where nothing is stated."""
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
    """Read the stated scale of a LoRA file or folder; None where nothing states one.

    Raises ValueError (without the file's name) when a statement cannot be understood, or two
    disagree.
    """
    sources = {CONFIG: _config_beside(path), "its metadata": _metadata_options(metadata)}
    stated = {
        place: _parse(options, place) for place, options in sources.items() if options is not None
    }
    scales = list(stated.values())
    if any(other != scales[0] for other in scales[1:]):
        raise ValueError(f"has another alpha in {' than in '.join(stated)}: correct one of them")
    return scales[0] if scales else None


def _config_beside(path: Path) -> dict[str, Any] | None:
    """Read the adapter_config.json of a PEFT folder, or beside a file in it."""
    if not path.is_dir() and path.stem != ADAPTER:
        return None
    config = (path if path.is_dir() else path.parent) / CONFIG
    try:
        return _mapping(read_json(config, CONFIG_BYTES), CONFIG)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has an {CONFIG} that is not a JSON object: copy it again") from error


def _metadata_options(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return PEFT's options from metadata of diffusers, SimpleTuner or kohya's scripts."""
    entries: dict[str, Any] = dict(metadata)
    if NESTED in metadata:
        try:
            entries |= _mapping(json.loads(metadata[NESTED]), NESTED)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"has a metadata {NESTED} that is not a JSON object: its scale is not known"
            ) from error
    for prefix in PREFIXES:
        options = {
            key.removeprefix(prefix): value
            for key, value in entries.items()
            if key.startswith(prefix)
        }
        if "lora_alpha" in options:
            return options
    return {"lora_alpha": entries["ss_network_alpha"]} if "ss_network_alpha" in entries else None


def _parse(options: Mapping[str, Any], place: str) -> StatedScale:
    if _flag(options.get("use_dora"), place):
        raise ValueError(f"is a DoRA, as {place} says: only plain LoRA files are read")
    patterns = _mapping(_parsed(options.get("alpha_pattern") or {}), place)
    return StatedScale(
        _number(options.get("lora_alpha"), place),
        {str(key): _number(alpha, place) for key, alpha in patterns.items()},
        _flag(options.get("use_rslora"), place),
    )


def _parsed(value: Any) -> Any:
    """Parse strings as JSON, as metadata has only strings; return other values unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _number(value: Any, place: str) -> float | None:
    parsed = _parsed(value)
    if parsed is None:
        return None
    is_number = isinstance(parsed, (int, float)) and not isinstance(parsed, bool)
    if not is_number or not abs(parsed) <= LARGEST_ALPHA:  # NaN fails, too
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
