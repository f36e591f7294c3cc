"""`autorefiner train CONFIG`: a TOML file to a trained refiner's file."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .demo.bundle import load_sprite_network, load_sprite_text, load_sprite_vae
from .demo.clips import held_out, show_clips, student_clips
from .demo.world import sample_scene
from .generate import SPRITES
from .noise.file import RefinerCard, fingerprint, save_refiner
from .noise.refiner import Refiner, merged
from .sample import RunPlan, sample
from .schedule import get_preset
from .training.loop import LoopOptions, keep_freed_memory, train
from .training.refine import RefineOptions, RefineStage
from .video import contact_sheet, to_frames
from .wan.causal import CausalWan
from .wan.checkpoint import load_transformer, load_vae_state
from .wan.lora import save_lora
from .wan.text import load_text_encoder
from .wan.vae import WanVAE

MAX_PROMPTS = 1_000_000
SPRITE_PROMPTS = 4096
SHEET_PROMPTS = 4


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
    vae: str = SPRITES  # of the sample sheets
    text_encoder: str = ""
    tokenizer: str = ""
    preset: str = "self-forcing"
    save_every: int = 100
    show_every: int = 500
    refiner: RefineOptions = field(default_factory=RefineOptions)

    @classmethod
    def read(cls, path: Path) -> "TrainConfig":
        """From a TOML file. ValueError in one line for anything that it cannot say."""
        try:
            import tomllib
        except ImportError as error:
            raise ValueError("training files need Python 3.11 or newer, which reads TOML") from error
        try:
            told = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TOML file: {error}") from error
        try:
            inner = told.pop("refiner", {})
            _check_names(told, cls, "")
            _check_names(inner, RefineOptions, "refiner.")
            preset = get_preset(told.get("preset", "self-forcing"))
            if "levels" in inner:
                inner["levels"] = tuple(inner["levels"])
            if "out" not in told:
                raise ValueError("does not say `out`, the file to write")
            folder = path.parent
            told |= {"out": folder / told["out"], "run": folder / told.get("run", f"{path.stem}_run")}
            for name in ("base", "teacher", "prompts", "vae", "text_encoder", "tokenizer"):
                if told.get(name, SPRITES) not in (SPRITES, ""):
                    told[name] = str(folder / told[name])
            return cls(**told, refiner=RefineOptions(**inner, preset=preset))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def _check_names(told: Mapping[str, Any], kind: type, prefix: str) -> None:
    """Raise ValueError for a name or a type that the dataclass does not have."""
    known = {one.name: one for one in fields(kind)}
    for name, value in told.items():
        if name not in known or (name in ("dmd", "preset") and prefix):
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"{prefix}{name} is not known{hint}")
        wanted = known[name].type
        fits = {int: int, float: (int, float), str: str, Path: str}.get(wanted)
        if fits and (not isinstance(value, fits) or isinstance(value, bool)):
            raise ValueError(f"{prefix}{name} is {value!r}, expected {wanted.__name__}")


def read_prompts(name: str) -> list[str]:
    """Prompts of a text file, or training captions of the sprite world; ValueError for a file with none."""
    if name == SPRITES:
        return [sample_scene(seed).caption.text for seed in range(SPRITE_PROMPTS)]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{path} is not there: `prompts` names a text file with a prompt a line")
    lines = [line.strip() for line in path.read_text().splitlines()[:MAX_PROMPTS]]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} is empty: write a prompt a line")
    return prompts


def make_encoder(config: TrainConfig, base: CausalWan, device: torch.device) -> Callable[[list[str]], Tensor]:
    """Prompts to contexts [B, L, text_dim]."""
    if config.base == SPRITES and not config.text_encoder:
        return load_sprite_text().to(device)
    if not config.text_encoder:
        raise ValueError("`text_encoder` is not said: name the umT5 folder or file that the base was trained with")
    encoder = load_text_encoder(
        Path(config.text_encoder), Path(config.tokenizer) if config.tokenizer else None, device=device,
        text_len=base.config.text_len, cache_dir=config.run / "contexts",
    )  # fmt: skip
    return lambda prompts: encoder.encode(prompts).to(device)


def load_network(name: str, sprite: str, device: torch.device) -> CausalWan:
    """A transformer of a file, or of the bundle."""
    if name == SPRITES:
        return load_sprite_network(sprite, device=device)
    model, info = load_transformer(Path(name), device=device, dtype=torch.float32)
    return CausalWan(model, info.config)


def make_stage(config: TrainConfig, device: torch.device) -> RefineStage:
    """Everything that a training needs, loaded and checked."""
    prompts = read_prompts(config.prompts)
    base, teacher = load_network(config.base, "student", device), load_network(config.teacher, "teacher", device)
    if (base.config.in_dim, base.config.text_dim) != (teacher.config.in_dim, teacher.config.text_dim):
        raise ValueError("base and teacher differ in latents or text encoder: train with a teacher of the base's kind")
    encode = make_encoder(config, base, device)
    vae = load_sprite_vae() if config.vae == SPRITES else WanVAE.from_state_dict(load_vae_state(config.vae))
    show = Sheets(base, encode, vae.to(device), None if config.base == SPRITES else prompts[:SHEET_PROMPTS])
    return RefineStage(config.refiner, base, teacher, prompts, encode, show)


@dataclass(frozen=True, slots=True)
class Sheets:
    """Sample sheets of a training: of its first prompts, each before and after; on the sprite world (no prompts) of
    held-out captions, with their exact scores."""

    base: CausalWan
    encode: Callable[[list[str]], Tensor]
    vae: WanVAE
    prompts: list[str] | None

    @torch.no_grad()
    def __call__(self, stage: RefineStage, folder: Path, index: int) -> dict[str, float]:
        network, refiner = trained(stage, self.base)
        if self.prompts is None:
            captions = held_out(stage.options.shown)
            clips = student_clips(network, self.encode, self.vae, captions, refiner=refiner)
            return show_clips(clips, captions, folder, index)
        options, frames = stage.options, []
        plan = RunPlan(options.preset, options.frames, options.height, options.width)
        for prompt in self.prompts:
            context = self.encode([prompt])
            for used, refined in ((self.base, None), (network, refiner)):
                latents = torch.cat(list(sample(used, context, plan, refiner=refined)), dim=2)
                clip = to_frames(self.vae.decode(latents))
                frames += [*clip[:: max(1, len(clip) // 8)][:8]]
        contact_sheet(frames, folder / f"sheet_{index:06d}.png")
        return {}


def trained(stage: RefineStage, base: CausalWan) -> tuple[CausalWan, Refiner | None]:
    """The base and the averaged refiner on it, or with method lora a network with the LoRA merged."""
    pairs = stage.average()
    if stage.options.method == "lora":
        return merged(base, pairs, silent_head=False), None
    return base, Refiner(merged(base, pairs), stage.options.cache, stage.options.refined)


def run_training(path: Path, device: torch.device) -> Path:
    """Train what a file says to its end and write the result; returns where."""
    return train_refiner(TrainConfig.read(path), device)


def train_refiner(config: TrainConfig, device: torch.device) -> Path:
    """Train to the end, from where the run stands, and write the result; returns where."""
    if not config.out.parent.is_dir():
        raise ValueError(f"{config.out.parent} is not a folder: make it, `out` is written there")
    if device.type == "cpu":
        keep_freed_memory()
    stage = make_stage(config, device)
    options = stage.options
    print(f"{options.method}: {options.steps} steps on {device} in {config.run}", file=sys.stderr)
    train(stage, LoopOptions(config.run, options.steps, config.save_every, config.show_every))
    pairs = stage.average()
    if options.method == "lora":
        save_lora(config.out, pairs, {"steps": str(options.steps), "objective": "dmd"})
        return config.out
    cache = options.cache
    card = RefinerCard(
        rank=options.rank, levels=tuple(sorted(options.refined, reverse=True)), history=cache.history,
        previous=cache.previous, base=fingerprint(stage.base.model), objective="dmd", steps=options.steps,
    )  # fmt: skip
    save_refiner(config.out, pairs, card)
    return config.out
