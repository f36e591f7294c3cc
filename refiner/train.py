"""`autorefiner train CONFIG`: a TOML file to a trained refiner's file."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .demo.bundle import FILES, WEIGHTS, load_sprite_network, load_sprite_reward, load_sprite_text, load_sprite_vae
from .demo.captions import misread
from .demo.clips import SHOWN, held_out, show_clips, student_clips
from .demo.reward_model import FRAMES
from .demo.world import sample_scene
from .noise.file import FINGERPRINTED, RefinerCard, fingerprint_of, save_refiner
from .noise.refiner import Refiner, merged
from .pictures import contact_sheet
from .reading import LINES_BYTES, open_regular, read_text
from .sample import RunPlan, sample
from .terminal import warn
from .train_config import SPRITES, RewardConfig, TrainConfig
from .training.begun import begin, digest
from .training.distributed import is_first, whole, world
from .training.dmd_objective import DmdObjective
from .training.loop import LoopOptions, keep_freed_memory, restore, train
from .training.objective import Objective
from .training.probe import Probe, probe
from .training.refine import RefineStage
from .training.reward_objective import RewardObjective
from .training.rewards.clip import SINGLE, load_clip_reward
from .training.rewards.reward import Mixture, Reward
from .video import to_frames
from .wan.causal import CausalWan
from .wan.checkpoint import load_transformer, load_vae_state
from .wan.lora import save_lora
from .wan.text import load_text_encoder
from .wan.vae import WanVAE

MAX_PROMPTS = 1_000_000
SPRITE_PROMPTS = 4096
SHEET_PROMPTS = 4
HELD_OUT = 16  # prompts
MAY_CHANGE = ("steps", "shown", "compiled", "checkpointing")  # when a run goes on


def read_prompts(name: str) -> list[str]:
    """Prompts of a UTF-8 file, or training captions of the sprite world; ValueError for a file with none."""
    if name == SPRITES:
        return [sample_scene(seed).caption.text for seed in range(SPRITE_PROMPTS)]
    path = Path(name)
    if not path.exists():
        raise ValueError(f"{path} is not there: `prompts` names a text file with a prompt a line")
    lines = [line.strip() for line in read_text(path, LINES_BYTES).splitlines()[:MAX_PROMPTS]]
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


def make_reward(config: RewardConfig, device: torch.device) -> Reward:
    """A reward as a file names it, with its model."""
    if config.kind != SPRITES:
        return load_clip_reward(config.kind, Path(config.path), device, config.draw(SINGLE))
    return load_sprite_reward(frames=config.draw(FRAMES), device=device)


def load_network(name: str, sprite: str, device: torch.device) -> CausalWan:
    """A transformer of a file, or of the bundle."""
    if name == SPRITES:
        return load_sprite_network(sprite, device=device)
    model, info = load_transformer(Path(name), device=device, dtype=torch.float32)
    return CausalWan(model, info.config)


def warn_of_misread(prompts: Sequence[str]) -> None:
    """Warn, once, of prompts that the sprites' text encoder does not take as a person would."""
    misunderstood = [prompt for prompt in prompts if misread(prompt)]
    if misunderstood:
        first = misunderstood[0]
        warnings.warn(
            f"{len(misunderstood)} of {len(prompts)} prompts are not like the sprites' captions, such as"
            f" {first[:40]!r}: {misread(first)[0]}",
            stacklevel=2,
        )


def split_prompts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Prompts to train on, and held-out ones."""
    prompts = read_prompts(config.prompts)
    if config.prompts == SPRITES:
        return prompts, [caption.text for caption in held_out(HELD_OUT)]
    return hold_out(prompts)


def hold_out(prompts: list[str]) -> tuple[list[str], list[str]]:
    """Prompts to train on, and the last tenth, at most 16, to compare with the base on."""
    count = min(HELD_OUT, len(prompts) // 10)
    return prompts[: len(prompts) - count], prompts[len(prompts) - count :]


def make_stage(config: TrainConfig, device: torch.device) -> RefineStage:
    """Everything that a training needs, loaded and checked."""
    prompts, unseen = split_prompts(config)
    base = load_network(config.base, "student", device)
    if config.base == SPRITES and not config.text_encoder and config.prompts != SPRITES:
        warn_of_misread(prompts)
    encode = make_encoder(config, base, device)
    vae = load_sprite_vae() if config.vae == SPRITES else WanVAE.from_state_dict(load_vae_state(config.vae))
    vae = vae.to(device, torch.float32)
    sheets = Sheets(base, encode, vae, None if config.base == SPRITES else prompts[:SHEET_PROMPTS])
    show = sheets if is_first() else gather_only
    objective = make_objective(config, base, encode, vae)
    return RefineStage(config.refiner, base, objective, prompts, encode, show, unseen)


def make_objective(
    config: TrainConfig, base: CausalWan, encode: Callable[[list[str]], Tensor], vae: WanVAE
) -> Objective:
    """What the file trains for, with the models that say how good a clip is."""
    device = vae.conv1.weight.device
    if config.refiner.objective == "reward":
        rewards = Mixture(tuple((make_reward(one, device), one.weight) for one in config.rewards))
        return RewardObjective(config.refiner, rewards, vae)
    teacher = load_network(config.teacher, "teacher", device)
    if (base.config.in_dim, base.config.text_dim) != (teacher.config.in_dim, teacher.config.text_dim):
        raise ValueError("base and teacher differ in latents or text encoder: train with a teacher of the base's kind")
    return DmdObjective(config.refiner, teacher, encode)


def gather_only(stage: RefineStage, folder: Path, index: int) -> dict[str, float]:
    """A process's part in the sheet that the first one draws."""
    stage.average()
    return {}


@dataclass(frozen=True, slots=True)
class Sheets:
    """Sample sheets of a training: its first prompts, before it (above) and now, from the same noise; on the sprite
    world (no prompts) held-out captions, with their exact scores."""

    base: CausalWan
    encode: Callable[[list[str]], Tensor]
    vae: WanVAE
    prompts: list[str] | None

    @torch.no_grad()
    def __call__(self, stage: RefineStage, folder: Path, index: int) -> dict[str, float]:
        network, refiner = trained(stage, self.base)
        if self.prompts is None:
            captions = held_out(stage.options.shown)
            models, preset = (self.encode, self.vae), stage.options.preset
            before = [*student_clips(self.base, *models, captions[:SHOWN], preset=preset)]
            clips = student_clips(network, *models, captions, preset=preset, refiner=refiner)
            return show_clips(clips, captions, folder, index, before)
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


def begun_with(config: TrainConfig, base: str, prompts: Sequence[str]) -> dict[str, Any]:
    """What a run depends on, wherever its files lie."""
    rewards = [{name: value for name, value in asdict(one).items() if name != "path"} for one in config.rewards]
    models = {"teacher": config.teacher} if config.refiner.objective == "dmd" else {"vae": config.vae}
    paths = {name: WEIGHTS / FILES[name] if path == SPRITES else Path(path) for name, path in models.items()}
    return {
        **asdict(config.refiner), "base": base, "prompts": digest(prompts), "rewards": rewards,
        **{name: seal(path) for name, path in paths.items()},
        "reward models": [seal(Path(one.path)) for one in config.rewards if one.path],
    }  # fmt: skip


def seal(path: Path) -> str:
    """What tells a model from others of its kind: of its file, or of each in its folder, the size and the first MiB."""
    told = hashlib.sha256()
    for part in sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else (path,):
        with open_regular(part) as file:
            told.update(f"{part.stat().st_size} ".encode() + file.read(1 << 20))
    return told.hexdigest()


def run_training(path: Path, device: torch.device) -> Path:
    """Train what a file says to its end and write the result; returns where."""
    return train_refiner(TrainConfig.read(path), device)


def run_probe(path: Path, device: torch.device, batches: int) -> Probe:
    """Probe the training that a file describes where its run stands, after the critic's warm-up, which is saved."""
    config = TrainConfig.read(path)
    stage, _ = prepare(config, device)
    warm_up = stage.options.first_update
    if restore(stage, config.run) < warm_up:
        stage.show = nothing_shown
        train(stage, LoopOptions(config.run, warm_up, config.save_every, warm_up))
    return probe(stage, batches)


def nothing_shown(folder: Path, index: int) -> dict[str, float]:
    """Draw no sheet: the refiner has not learnt yet."""
    return {}


def prepare(config: TrainConfig, device: torch.device) -> tuple[RefineStage, str]:
    """The stage of a run, which begins or goes on, and the base's fingerprint."""
    if not config.out.parent.is_dir():
        raise ValueError(f"{config.out.parent} is not a folder: make it, `out` is written there")
    if device.type == "cpu":
        keep_freed_memory()
    stage = make_stage(config, device)
    options = stage.options
    if is_first():
        several = f", in {world()} processes" if world() > 1 else ""
        warn(f"{options.method}: {options.steps} steps on {device} in {config.run}{several}")
    base = fingerprint_of({name: whole(stage.base.model.get_parameter(name)) for name in FINGERPRINTED})
    begin(config.run, begun_with(config, base, stage.prompts), MAY_CHANGE, first=is_first())
    return stage, base


def train_refiner(config: TrainConfig, device: torch.device) -> Path:
    """Train to the end, from where the run stands, and write the result; returns where."""
    stage, base = prepare(config, device)
    options = stage.options
    train(stage, LoopOptions(config.run, options.steps, config.save_every, config.show_every))
    pairs = stage.average()
    if not is_first():
        return config.out
    if options.method == "lora":
        save_lora(config.out, pairs, {"steps": str(options.steps), "objective": options.objective})
        return config.out
    cache = options.cache
    card = RefinerCard(
        rank=options.rank, levels=tuple(sorted(options.refined, reverse=True)), history=cache.history,
        previous=cache.previous, base=base, objective=options.objective, steps=options.steps,
    )  # fmt: skip
    save_refiner(config.out, pairs, card)
    return config.out
