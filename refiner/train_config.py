"""The TOML file of `autorefiner train`, checked before any model is loaded."""

import sys
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any

import torch

from .bundles import BUNDLES, DEMO, find_training_bundle
from .reading import CONFIG_BYTES, read_text
from .schedule import get_preset
from .training.options import RefineOptions
from .training.rewards.clip import FORMULAS, SINGLE, load_clip_reward
from .training.rewards.reward import FrameDraw, Reward
from .wan.checkpoint import inspect

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = (*(name for name in BUNDLES if find_training_bundle(name)), *FORMULAS)
FALLBACK_PRESET = "self-forcing"
PATHS = ("base", "teacher", "prompts", "vae", "text_encoder", "tokenizer")
TYPES = {int: int, float: (int, float), str: str, Path: str, bool: bool}  # of a field: in TOML


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """A `[[rewards]]` table: a bundle's reward model, or a CLIP model's folder and formula."""

    kind: str
    path: str = ""
    weight: float = 1.0
    frames: int = 0  # drawn a step; 0: as is good for the kind
    interval: int = 0  # of a clip of frames; 0: single ones

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rewards.kind {self.kind!r} is not known: use {', '.join(KINDS)}")
        if bool(self.path) != (self.kind in FORMULAS):
            advice = "it is bundled, leave `path` out"
            if self.kind in FORMULAS:
                advice = "name the model's folder as `path`"
            raise ValueError(f"rewards.path of {self.kind} is {self.path!r}: {advice}")
        if self.interval and not self.frames:
            raise ValueError(
                f"rewards.interval {self.interval} of {self.kind} is said without `frames`: say"
                " both"
            )
        if not abs(self.weight) < inf:
            raise ValueError(f"rewards.weight {self.weight} of {self.kind}: give a finite number")

    def draw(self, usual: FrameDraw) -> FrameDraw:
        """The frames that the reward sees, where the kind's `usual` ones are not overridden."""
        if not self.frames:
            return usual
        return FrameDraw(self.frames, self.interval, usual.opening)

    def load(self, device: torch.device | str = "cpu") -> Reward:
        """Load the reward with its model."""
        if bundle := find_training_bundle(self.kind):
            return bundle.training.reward(self.draw, device)
        return load_clip_reward(self.kind, Path(self.path), device, self.draw(SINGLE))


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A training file. Paths are relative to the file; a bundle's name stands for its own models.

    `out` gets the refiner (or, with method lora, a LoRA that ComfyUI's own loader reads); `run` the
    state, log and sample sheets, from which the same command goes on.
    """

    out: Path
    run: Path
    base: str = DEMO
    teacher: str = DEMO  # a bidirectional model of the same latents: the real score
    prompts: str = DEMO  # a text file, a prompt a line
    vae: str = DEMO  # of the sample sheets and the rewards
    text_encoder: str = ""
    tokenizer: str = ""
    preset: str = FALLBACK_PRESET
    sampler_levels: tuple[int, ...] = ()  # nominal, falling from 1000; none: the preset's
    save_every: int = 100
    show_every: int = 500
    refiner: RefineOptions = field(default_factory=RefineOptions)
    rewards: tuple[RewardConfig, ...] = ()

    def __post_init__(self) -> None:
        if self.out.is_dir():
            raise ValueError(f"out {self.out} is a folder: name the file to write")
        if bool(self.rewards) != (self.refiner.objective == "reward"):
            raise ValueError(
                f"refiner.objective is {self.refiner.objective!r} with {len(self.rewards)}"
                ' [[rewards]]: objective "reward" takes at least one, and no other does'
            )

    @classmethod
    def read(cls, path: Path) -> "TrainConfig":
        """Read a TOML file; ValueError in one line for anything that it cannot say."""
        try:
            document = tomllib.loads(read_text(path, CONFIG_BYTES))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is no TOML file: {error}") from error
        except RecursionError as error:
            raise ValueError(
                f"{path} is no TOML file of a training: it is nested too deeply"
            ) from error
        try:
            return cls._parse(document, path)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _parse(cls, document: dict[str, Any], path: Path) -> "TrainConfig":
        folder = path.parent
        options, rewards = document.pop("refiner", {}), document.pop("rewards", [])
        _check_tables(document, options, rewards)
        if "preset" not in document:
            document["preset"] = _preset_of(document.get("base", DEMO), folder)
        sampler_levels = _parse_levels(document.get("sampler_levels", []), "sampler_levels")
        document["sampler_levels"] = sampler_levels
        preset = get_preset(document["preset"]).changed(steps=sampler_levels or None)
        levels = options.get("levels", [*preset.steps[1:]])
        options["levels"] = _parse_levels(levels, "refiner.levels")
        if not document.get("out"):
            raise ValueError("does not say `out`, the file to write")
        if "betas" in options:
            options["betas"] = _parse_betas(options["betas"])
        _check_complete(document, options)
        document["out"] = folder / document["out"]
        document["run"] = folder / document.get("run", f"{path.stem}_run")
        for name in PATHS:
            value = document.get(name)
            if value and find_training_bundle(value) is None:
                document[name] = str(folder / value)
        return cls(
            **document,
            refiner=RefineOptions(**options, preset=preset),
            rewards=tuple(_parse_reward(reward, folder) for reward in rewards),
        )


def _parse_reward(table: dict[str, Any], folder: Path) -> RewardConfig:
    if table.get("path"):
        table = table | {"path": str(folder / table["path"])}
    return RewardConfig(**table)


def _preset_of(base: str, folder: Path) -> str:
    """The preset of a base; ValueError names the likely ones where its file proves none."""
    if bundle := find_training_bundle(base):
        return bundle.preset
    path = folder / base
    if not path.exists():
        return FALLBACK_PRESET  # loading the base says that it is not there
    info = inspect(path)
    if info.preset is None:
        reason = info.preset_reason.replace("pass --preset", "set preset to")
        raise ValueError(f"does not say the preset of {base}: {reason}")
    return info.preset


def _parse_levels(value: object, name: str) -> tuple[int, ...]:
    """The whole numbers of a TOML list; ValueError for anything else."""
    if not isinstance(value, list) or not all(type(level) is int for level in value):
        raise ValueError(f"{name} is {value!r}, expected a list of whole numbers, like [750, 500]")
    return tuple(value)


def _parse_betas(value: object) -> tuple[float, ...]:
    """The numbers of a TOML list; ValueError for anything else."""
    if not isinstance(value, list) or not all(type(beta) in (int, float) for beta in value):
        raise ValueError(
            f"refiner.betas is {value!r}, expected a list of two numbers, like [0.9, 0.999]"
        )
    return tuple(value)


def _check_complete(document: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError where the bundle's defaults would decide what another base is trained on."""
    if find_training_bundle(document.get("base", DEMO)):
        return
    missing = [name for name in ("prompts", "vae") if name not in document]
    missing += [f"refiner.{name}" for name in ("height", "width") if name not in options]
    if missing:
        raise ValueError(
            f"does not say {', '.join(missing)}: with a base of your own say them, as nothing else"
            " can"
        )


def _check_tables(document: Mapping[str, Any], options: object, rewards: object) -> None:
    """Raise ValueError for a table, a name or a type that a training file does not have."""
    lists_tables = isinstance(rewards, list) and all(isinstance(one, dict) for one in rewards)
    if not isinstance(options, dict) or not lists_tables:
        raise ValueError(
            "the options of the refiner are a table, [refiner], and each reward is one, [[rewards]]"
        )
    _check_names(document, TrainConfig, "")
    _check_names(options, RefineOptions, "refiner.")
    for reward in rewards:
        _check_names(reward, RewardConfig, "rewards.")
        if "kind" not in reward:
            raise ValueError(f"a [[rewards]] does not say its `kind`: use {', '.join(KINDS)}")


def _check_names(table: Mapping[str, Any], kind: type, prefix: str) -> None:
    """Raise ValueError for a name or a type that the dataclass does not have."""
    known = {one.name: one for one in fields(kind)}
    for name, value in table.items():
        if name == "preset" and prefix:
            raise ValueError("refiner.preset is not known: say `preset` above [refiner]")
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"{prefix}{name} is not known{hint}")
        _check_type(value, known[name], prefix)


def _check_type(value: object, wanted: Field, prefix: str) -> None:
    """Raise ValueError for a value that a field cannot hold; lists are checked where parsed."""
    types = TYPES.get(wanted.type)
    if types is None:
        return
    is_stray_bool = isinstance(value, bool) and wanted.type is not bool
    if not isinstance(value, types) or is_stray_bool:
        raise ValueError(f"{prefix}{wanted.name} is {value!r}, expected {wanted.type.__name__}")
