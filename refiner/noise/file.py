"""A refiner as a file: NAME.refiner.safetensors, whose keys no LoRA loader matches, and what it
says of itself."""

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
from ..wan.weight_file import FLAT, save_safetensors
from .refiner import HEAD

KEY = "autorefiner"  # of the metadata
VERSION = 1
LONGEST_OBJECTIVE = 60  # characters
# Small, never quantised, and touched by no LoRA: an fp8 copy of a base, or one with LoRAs merged,
# has the same.
FINGERPRINTED = (
    "patch_embedding.bias",
    "blocks.0.modulation",
    "head.modulation",
    "time_embedding.0.bias",
)


@dataclass(frozen=True, slots=True)
class RefinerCard:
    """How a refiner was trained, and so how it is used unless a user says otherwise."""

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
        """From a file's metadata, which is not trusted; ValueError (without the file's name) for
        what is no card."""
        try:
            told: Any = json.loads(text)
            card = cls(
                int(told["rank"]), tuple(int(step) for step in told["levels"]), str(told["history"]),
                str(told["previous"]), str(told.get("base", "")), plain_words(str(told.get("objective", ""))),
                int(told.get("steps", 0)), int(told.get("version", VERSION)),
            )  # fmt: skip
            card.cache  # noqa: B018, it checks the two modes
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
    """Of a network's own weights: sha256 over a few of its tensors, rounded to bf16."""
    return fingerprint_of({name: model.get_parameter(name) for name in FINGERPRINTED})


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """The same of weights by name, of which only those few are read."""
    digest = hashlib.sha256()
    for name in FINGERPRINTED:
        tensor = weights[name].detach().to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_refiner(path: Path | str, pairs: Mapping[str, LoraPair], card: RefinerCard) -> None:
    """Write the factors in bf16, alpha folded into B; whatever stood at `path` stays until the new
    file is complete."""
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{REFINER_PREFIX}{name}.lora_A.weight"] = pair.down.bfloat16()
        tensors[f"{REFINER_PREFIX}{name}.lora_B.weight"] = (pair.up.float() * pair.scale).bfloat16()
    save_safetensors(path, tensors, {KEY: json.dumps({"method": "AutoRefiner", **asdict(card)})})


def largest(card: RefinerCard, name: str, up: Tensor) -> int:
    """The largest rank of a layer: the card's, but on the final layer that of the layer itself."""
    return max(card.rank, len(up)) if f".{HEAD}." in name else card.rank


def load_refiner(path: Path | str) -> tuple[dict[str, LoraPair], RefinerCard]:
    """Factors by layer, mapped from the file, and the card. ValueError in one line for anything
    that is no refiner."""
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
            other = name.replace(".lora_A.", ".lora_B.")
            if other not in file.groups[FLAT]:
                raise ValueError(f"has {name} without {other}: it is not complete")
            down, up = file.read(FLAT, name), file.read(FLAT, other)
            if (
                down.ndim != 2
                or up.ndim != 2
                or down.shape[0] != up.shape[1]
                or len(down) > largest(card, other, up)
            ):
                raise ValueError(
                    f"has factors of {list(up.shape)} and {list(down.shape)} for {name} and says rank {card.rank}: its"
                    " ranks do not match"
                )
            if min(down.dtype.itemsize, up.dtype.itemsize) < 2:
                raise ValueError(
                    f"has {name} in {down.dtype}, so it is quantised: pass the bf16 file"
                )
            pairs[name.removeprefix(REFINER_PREFIX).removesuffix(".lora_A.weight")] = LoraPair(
                down, up, 1.0
            )
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return pairs, card


def other_base(card: RefinerCard, own: str | None) -> str | None:
    """A line of warning where a refiner was trained on another network than one of this fingerprint
    (if known)."""
    if not card.base or not own or card.base == own:
        return None
    return "this refiner was trained on another base model: it may do nothing good here, compare with strength 0"
