"""The TOML file of `autorefiner train`: what it may say, checked before anything is loaded."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any

from .generate import SPRITES
from .reading import CONFIG_BYTES, read_text
from .schedule import get_preset
from .training.options import RefineOptions
from .training.rewards.clip import FORMULAS
from .training.rewards.reward import FrameDraw
from .wan.checkpoint import inspect

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = (SPRITES, *FORMULAS)


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """One `[[rewards]]` table: the bundled text-video model, or a CLIP-family model's folder (`path`) and formula."""

    kind: str
    path: str = ""
    weight: float = 1.0
    frames: int = 0  # drawn a step; 0: as is good for the kind
    interval: int = 0  # of a clip of frames; 0: single ones

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rewards.kind {self.kind!r} is not known: use {', '.join(KINDS)}")
        if bool(self.path) != (self.kind in FORMULAS):
            wanted = "name the model's folder as `path`" if self.kind in FORMULAS else "it is bundled, leave `path` out"
            raise ValueError(f"rewards.path of {self.kind} is {self.path!r}: {wanted}")
        if self.interval and not self.frames:
            raise ValueError(f"rewards.interval {self.interval} of {self.kind} is said without `frames`: say both")
        if not abs(self.weight) < inf:
            raise ValueError(f"rewards.weight {self.weight} of {self.kind}: give a finite number")

    def draw(self, usual: FrameDraw) -> FrameDraw:
        """Which frames it sees, where `usual` is what the kind is made for."""
        return FrameDraw(self.frames, self.interval, usual.opening) if self.frames else usual


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What a training file says. Paths are relative to the file; `sprites` names the bundled demo.

    `out` gets the refiner (or, with method lora, a LoRA that ComfyUI's own loader reads); `run` the state, log and
    sample sheets, from which the same command goes on.
    """

    out: Path
    run: Path
    base: str = SPRITES
    teacher: str = SPRITES  # a bidirectional model of the same latents: the real score
    prompts: str = SPRITES  # a text file, a prompt a line
    vae: str = SPRITES  # of the sample sheets and the rewards
    text_encoder: str = ""
    tokenizer: str = ""
    preset: str = "self-forcing"
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
                f"refiner.objective is {self.refiner.objective!r} with {len(self.rewards)} [[rewards]]: objective"
                ' "reward" takes at least one, and no other does'
            )

    @classmethod
    def read(cls, path: Path) -> "TrainConfig":
        """From a TOML file. ValueError in one line for anything that it cannot say."""
        try:
            told = tomllib.loads(read_text(path, CONFIG_BYTES))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is no TOML file: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path} is no TOML file of a training: it is nested too deeply") from error
        try:
            return cls._of(told, path)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, told: dict[str, Any], path: Path) -> "TrainConfig":
        inner, rewards = told.pop("refiner", {}), told.pop("rewards", [])
        if (
            not isinstance(inner, dict)
            or not isinstance(rewards, list)
            or not all(isinstance(r, dict) for r in rewards)
        ):
            raise ValueError("the options of the refiner are a table, [refiner], and each reward is one, [[rewards]]")
        _check_names(told, cls, "")
        _check_names(inner, RefineOptions, "refiner.")
        for one in rewards:
            _check_names(one, RewardConfig, "rewards.")
            if "kind" not in one:
                raise ValueError(f"a [[rewards]] does not say its `kind`: use {', '.join(KINDS)}")
        folder = path.parent
        if "preset" not in told:
            told["preset"] = _preset_of(told.get("base", SPRITES), folder)
        told["sampler_levels"] = _levels_of(told.get("sampler_levels", []), "sampler_levels")
        preset = get_preset(told["preset"]).changed(steps=told["sampler_levels"] or None)
        inner["levels"] = _levels_of(inner.get("levels", [*preset.steps[1:]]), "refiner.levels")
        if not told.get("out"):
            raise ValueError("does not say `out`, the file to write")
        if "betas" in inner:
            inner["betas"] = _betas_of(inner["betas"])
        _check_said(told, inner)
        told |= {"out": folder / told["out"], "run": folder / told.get("run", f"{path.stem}_run")}
        for name in ("base", "teacher", "prompts", "vae", "text_encoder", "tokenizer"):
            if told.get(name, SPRITES) not in (SPRITES, ""):
                told[name] = str(folder / told[name])
        found = tuple(
            RewardConfig(**one | ({"path": str(folder / one["path"])} if one.get("path") else {})) for one in rewards
        )
        return cls(**told, refiner=RefineOptions(**inner, preset=preset), rewards=found)


def _preset_of(base: str, folder: Path) -> str:
    """The preset that a base is sampled with; ValueError names the likely ones where its file does not prove it."""
    path = folder / base
    if base == SPRITES or not path.exists():
        return "self-forcing"
    info = inspect(path)
    if info.preset is None:
        reason = info.preset_reason.replace("pass --preset", "set preset to")
        raise ValueError(f"does not say the preset of {base}: {reason}")
    return info.preset


def _check_said(told: Mapping[str, Any], inner: Mapping[str, Any]) -> None:
    """Raise ValueError where defaults, which are the sprites', would decide what another base is trained on."""
    if told.get("base", SPRITES) == SPRITES:
        return
    missing = [name for name in ("prompts", "vae") if name not in told]
    missing += [f"refiner.{name}" for name in ("height", "width") if name not in inner]
    if missing:
        raise ValueError(f"does not say {', '.join(missing)}: with a base of your own say them, as nothing else can")


def _levels_of(value: object, name: str) -> tuple[int, ...]:
    """From a TOML list; ValueError unless it holds whole numbers."""
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise ValueError(f"{name} is {value!r}, expected a list of whole numbers, like [750, 500]")
    return tuple(value)


def _betas_of(value: object) -> tuple[float, ...]:
    """From a TOML list; ValueError unless it holds numbers."""
    if not isinstance(value, list) or not all(type(one) in (int, float) for one in value):
        raise ValueError(f"refiner.betas is {value!r}, expected a list of two numbers, like [0.9, 0.999]")
    return tuple(value)


def _check_names(told: Mapping[str, Any], kind: type, prefix: str) -> None:
    """Raise ValueError for a name or a type that the dataclass does not have."""
    known = {one.name: one for one in fields(kind)}
    for name, value in told.items():
        if name not in known or (name == "preset" and prefix):
            if name == "preset":
                raise ValueError("refiner.preset is not known: say `preset` above [refiner]")
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"{prefix}{name} is not known{hint}")
        wanted = known[name].type
        fits = {int: int, float: (int, float), str: str, Path: str, bool: bool}.get(wanted)
        if fits and (not isinstance(value, fits) or (isinstance(value, bool) and wanted is not bool)):
            raise ValueError(f"{prefix}{name} is {value!r}, expected {wanted.__name__}")
