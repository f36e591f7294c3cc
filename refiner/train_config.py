"""Read and check the TOML file of `autorefiner train` before any model is loaded."""

import sys
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any

import torch

from .bundles import BUNDLES, DEMO, find_training_bundle
from .choices import choose
from .memory.policies import POLICIES
from .memory.positions import POSITIONS
from .reading import CONFIG_BYTES, read_text
from .run_plan import suggested
from .schedule import Preset, get_preset
from .training.options import RefineOptions
from .training.rewards.clip import FORMULAS, SINGLE, load_clip_reward
from .training.rewards.reward import FrameDraw, Reward
from .wan.checkpoint import inspect

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUNDLED = tuple(name for name, bundle in BUNDLES.items() if bundle.training)
KINDS = (*BUNDLED, *FORMULAS)
FALLBACK_PRESET = "self-forcing"
PATHS = ("base", "teacher", "prompts", "vae", "text_encoder", "tokenizer")
# types of fields: types of their values in TOML
TYPES = {int: int, int | None: int, float: (int, float), str: str, Path: str, bool: bool}


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """A `[[rewards]]` table: a bundle's reward model, or a CLIP model's folder and formula."""

    kind: str
    path: str = ""
    weight: float = 1.0
    frames: int = 0  # drawn per step; 0: the default of the kind
    interval: int = 0  # between the frames of a clip; 0: single frames

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
                f"rewards.interval {self.interval} of {self.kind} is set without `frames`: set both"
            )
        if not abs(self.weight) < inf:
            raise ValueError(f"rewards.weight {self.weight} of {self.kind}: give a finite number")

    def draw(self, usual: FrameDraw) -> FrameDraw:
        """Return the frames that the reward sees: `usual` ones unless the table overrides them."""
        if not self.frames:
            return usual
        return FrameDraw(self.frames, self.interval, usual.opening)

    @property
    def file(self) -> Path:
        """The reward model's file, or its folder."""
        bundle = find_training_bundle(self.kind)
        return bundle.training.reward_file if bundle else Path(self.path)

    def load(self, device: torch.device | str = "cpu") -> Reward:
        """Load the reward with its model."""
        if bundle := find_training_bundle(self.kind):
            return bundle.training.reward(self.draw, device)
        return load_clip_reward(self.kind, Path(self.path), device, self.draw(SINGLE))


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A training file. Paths are relative to the file; a bundle's name stands for its files.

    `out` is the file of the refiner (with method lora, of a LoRA for ComfyUI's loader); `run` is
    the folder of the state, from which the same command continues, the log and sample sheets.
    """

    out: Path
    run: Path
    base: str = DEMO
    teacher: str = DEMO  # a bidirectional model of the same latents: the real score
    prompts: str = DEMO  # a text file, one prompt a line
    vae: str = DEMO  # for sample sheets and rewards
    text_encoder: str = ""
    tokenizer: str = ""
    preset: str = FALLBACK_PRESET
    sampler_levels: tuple[int, ...] = ()  # nominal, falling from 1000; empty: the preset's
    memory: str = ""  # a memory policy with knobs; empty: the preset's
    positions: str = ""  # with knobs; empty: the preset's
    window: int | None = None  # None: the preset's, or that of `memory`
    sink: int | None = None
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
        """Read a TOML file; ValueError for anything that a training file does not allow."""
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
        preset = _parse_preset(document).changed(levels=sampler_levels or None)
        levels = options.get("levels", [*preset.levels[1:]])
        options["levels"] = _parse_levels(levels, "refiner.levels")
        if not document.get("out"):
            raise ValueError("does not set `out`, the file to write")
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


def _parse_preset(document: Mapping[str, Any]) -> Preset:
    """Return the preset with the memory that the file chooses."""
    preset = get_preset(document["preset"])
    memory = document.get("memory") or preset.memory
    preset = suggested(preset, choose(memory, POLICIES, "memory")).changed(
        memory=memory,
        window=document.get("window"),
        sink=document.get("sink"),
        positions=document.get("positions") or None,
    )
    choose(preset.positions, POSITIONS, "positions")
    return preset


def _parse_reward(table: dict[str, Any], folder: Path) -> RewardConfig:
    if table.get("path"):
        table = table | {"path": str(folder / table["path"])}
    return RewardConfig(**table)


def _preset_of(base: str, folder: Path) -> str:
    """Return the preset of a base; ValueError when its file does not prove one."""
    if bundle := find_training_bundle(base):
        return bundle.preset
    path = folder / base
    if not path.exists():
        return FALLBACK_PRESET  # loading the base reports the missing file
    info = inspect(path)
    if info.preset is None:
        reason = info.preset_reason.replace("pass --preset", "set preset to")
        raise ValueError(f"does not set the preset of {base}: {reason}")
    return info.preset


def _parse_levels(value: object, name: str) -> tuple[int, ...]:
    """Return the whole numbers of a TOML list; ValueError for anything else."""
    if not isinstance(value, list) or not all(type(level) is int for level in value):
        raise ValueError(f"{name} is {value!r}, expected a list of whole numbers, like [750, 500]")
    return tuple(value)


def _parse_betas(value: object) -> tuple[float, ...]:
    """Return the numbers of a TOML list; ValueError for anything else."""
    if not isinstance(value, list) or not all(type(beta) in (int, float) for beta in value):
        raise ValueError(
            f"refiner.betas is {value!r}, expected a list of two numbers, like [0.9, 0.999]"
        )
    return tuple(value)


def _check_complete(document: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError when another base would be trained with the bundle's defaults."""
    if find_training_bundle(document.get("base", DEMO)):
        return
    missing = [name for name in ("prompts", "vae") if name not in document]
    missing += [f"refiner.{name}" for name in ("height", "width") if name not in options]
    if missing:
        raise ValueError(
            f"does not set {', '.join(missing)}: with a base of your own set them, they have no"
            " defaults"
        )


def _check_tables(document: Mapping[str, Any], options: object, rewards: object) -> None:
    """Raise ValueError for a table, a name or a type that a training file does not allow."""
    lists_tables = isinstance(rewards, list) and all(isinstance(reward, dict) for reward in rewards)
    if not isinstance(options, dict) or not lists_tables:
        raise ValueError(
            "the options of the refiner are a table, [refiner], and each reward is one, [[rewards]]"
        )
    _check_names(document, TrainConfig, "")
    _check_names(options, RefineOptions, "refiner.")
    for reward in rewards:
        _check_names(reward, RewardConfig, "rewards.")
        if "kind" not in reward:
            raise ValueError(f"a [[rewards]] does not set its `kind`: use {', '.join(KINDS)}")


def _check_names(table: Mapping[str, Any], kind: type, prefix: str) -> None:
    """Raise ValueError for a name or a type that the dataclass does not have."""
    known = {each.name: each for each in fields(kind)}
    for name, value in table.items():
        if name == "preset" and prefix:
            raise ValueError("refiner.preset is not known: set `preset` above [refiner]")
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"{prefix}{name} is not known{hint}")
        _check_type(value, known[name], prefix)


def _type_name(wanted: Any) -> str:
    return "int" if wanted == int | None else wanted.__name__


def _check_type(value: object, wanted: Field, prefix: str) -> None:
    """Raise ValueError for a value of the wrong type; lists are checked where they are parsed."""
    types = TYPES.get(wanted.type)
    if types is None:
        return
    is_stray_bool = isinstance(value, bool) and wanted.type is not bool
    if not isinstance(value, types) or is_stray_bool:
        raise ValueError(f"{prefix}{wanted.name} is {value!r}, expected {_type_name(wanted.type)}")
