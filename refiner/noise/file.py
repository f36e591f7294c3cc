"""Refiner files: NAME.refiner.safetensors, with keys that no LoRA loader matches."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..memory.reflect import ReflectiveCache
from ..wan.checkpoint import INSTEAD, open_checkpoint
from ..wan.layouts import REFINER_PREFIX
from ..wan.lora import LoraPair
from ..wan.weight_file import FLAT, WeightFile, save_safetensors
from .refiner import HEAD

KEY = "autorefiner"  # of the metadata
VERSION = 1
LONGEST_OBJECTIVE = 60  # characters
# Small, never quantised and in no LoRA, so an fp8 copy of a base, or one with merged LoRAs, has the
# same fingerprint.
FINGERPRINTED = (
    "patch_embedding.bias",
    "blocks.0.modulation",
    "head.modulation",
    "time_embedding.0.bias",
)


@dataclass(frozen=True, slots=True)
class RefinerCard:
    """How a refiner was trained: the defaults of its use."""

    rank: int
    levels: tuple[int, ...] = (750, 500, 250)  # nominal steps
    history: str = "shared"
    previous: str = "pending"
    base: str = ""  # fingerprint of the network it was trained on
    objective: str = ""
    steps: int = 0
    version: int = VERSION

    @property
    def cache(self) -> ReflectiveCache:
        return ReflectiveCache(self.history, self.previous)

    @classmethod
    def parse(cls, text: str) -> "RefinerCard":
        """Parse a file's untrusted metadata; ValueError, without the file's name, for no card."""
        try:
            metadata: Any = json.loads(text)
            card = cls(
                rank=int(metadata["rank"]),
                levels=tuple(int(step) for step in metadata["levels"]),
                history=str(metadata["history"]),
                previous=str(metadata["previous"]),
                base=str(metadata.get("base", "")),
                objective=plain_words(str(metadata.get("objective", ""))),
                steps=int(metadata.get("steps", 0)),
                version=int(metadata.get("version", VERSION)),
            )
            card.cache  # noqa: B018, it checks history and previous
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"does not say how it was trained ({error}): it is no refiner of this pack"
            ) from error
        if card.version > VERSION or not card.levels:
            raise ValueError(
                f"is of version {card.version} with levels {list(card.levels)}: update AutoRefiner"
            )
        return card


def plain_words(text: str) -> str:
    """Keep letters, digits and simple marks, on one line."""
    return " ".join(re.sub(r"[^\w+.,-]", " ", text).split())[:LONGEST_OBJECTIVE]


def fingerprint(model: nn.Module) -> str:
    """Hash a few tensors of a network, rounded to bf16, by sha256."""
    return fingerprint_of({name: model.get_parameter(name) for name in FINGERPRINTED})


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """Hash the same tensors of weights given by name."""
    digest = hashlib.sha256()
    for name in FINGERPRINTED:
        tensor = weights[name].detach().to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_refiner(path: Path | str, pairs: Mapping[str, LoraPair], card: RefinerCard) -> None:
    """Write the factors in bf16, with alpha folded into B; replace `path` once complete."""
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{REFINER_PREFIX}{name}.lora_A.weight"] = pair.down.bfloat16()
        tensors[f"{REFINER_PREFIX}{name}.lora_B.weight"] = (pair.up.float() * pair.scale).bfloat16()
    save_safetensors(path, tensors, {KEY: json.dumps({"method": "AutoRefiner", **asdict(card)})})


def largest(card: RefinerCard, name: str, up: Tensor) -> int:
    """Return the largest allowed rank of a layer: the card's, or more on the final layer."""
    return max(card.rank, len(up)) if f".{HEAD}." in name else card.rank


def load_refiner(path: Path | str) -> tuple[dict[str, LoraPair], RefinerCard]:
    """Return the factors by layer, mapped from the file, and the card.

    Raises ValueError for anything that is no refiner.
    """
    checkpoint = open_checkpoint(path)
    kind, file = checkpoint.info.kind, checkpoint.file
    if kind != "refiner":
        raise ValueError(
            f"{path} is {INSTEAD.get(kind, 'no model that is known')}; a refiner was asked for"
        )
    pairs: dict[str, LoraPair] = {}
    try:
        card = RefinerCard.parse(file.metadata.get(KEY, "null"))
        names = [name for name in file.groups[FLAT] if name.endswith(".lora_A.weight")]
        for name in names:
            layer = name.removeprefix(REFINER_PREFIX).removesuffix(".lora_A.weight")
            pairs[layer] = read_pair(file, name, card)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return pairs, card


def read_pair(file: WeightFile, name: str, card: RefinerCard) -> LoraPair:
    """Read the two factors of a layer, of which `name` is the first; ValueError if they are odd."""
    other = name.replace(".lora_A.", ".lora_B.")
    if other not in file.groups[FLAT]:
        raise ValueError(f"has {name} without {other}: it is not complete")
    down, up = file.read(FLAT, name), file.read(FLAT, other)
    fits = down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]
    if not fits or len(down) > largest(card, other, up):
        raise ValueError(
            f"has factors of {list(up.shape)} and {list(down.shape)} for {name} and says rank"
            f" {card.rank}: its ranks do not match"
        )
    if min(down.dtype.itemsize, up.dtype.itemsize) < 2:
        raise ValueError(f"has {name} in {down.dtype}, so it is quantised: pass the bf16 file")
    return LoraPair(down, up, 1.0)


def other_base(card: RefinerCard, base: str | None) -> str | None:
    """Return a warning if a refiner was trained on a base with another fingerprint, if known."""
    if not card.base or not base or card.base == base:
        return None
    return (
        "refiner was trained on another base model: results may degrade (compare with strength 0)"
    )
