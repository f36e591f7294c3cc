"""Train a refiner from a TOML file: the work of `autorefiner train`."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bundles import DEMO, Bundle, find_training_bundle
from .noise.file import FINGERPRINTED, RefinerCard, fingerprint_of, save_refiner
from .reading import LINES_BYTES, open_regular, read_text
from .terminal import warn
from .train_config import RewardConfig, TrainConfig
from .training.begun import begin, digest
from .training.distributed import is_first, whole, world
from .training.dmd_objective import DmdObjective
from .training.loop import LoopOptions, keep_freed_memory, restore, train
from .training.objective import Objective
from .training.options import RefineOptions
from .training.probe import Probe, probe
from .training.refiner_stage import RefinerStage
from .training.reward_objective import RewardObjective
from .training.rewards.reward import Mixture
from .training.sheets import PROMPTS as SHEET_PROMPTS
from .training.sheets import Sheets, Show, gather_only
from .wan.causal import CausalWan
from .wan.checkpoint import load_transformer, load_vae_state
from .wan.lora import save_lora
from .wan.text import load_text_encoder
from .wan.vae import WanVAE

MAX_PROMPTS = 1_000_000
BUNDLED_PROMPTS = 4096
HELD_OUT = 16  # prompts
MAY_CHANGE = ("steps", "shown", "compiled", "checkpointing")  # options of a continued run

Encode = Callable[[list[str]], Tensor]  # prompts to contexts [B, L, text_dim]


def run_training(path: Path, device: torch.device) -> Path:
    """Run the training that a file describes; return the path of the result."""
    return train_refiner(TrainConfig.read(path), device)


def train_on_demo(options: RefineOptions, out: Path, run: Path, device: torch.device) -> Path:
    """Train a refiner of the demo's model, with its teacher, prompts and reward."""
    rewards = (RewardConfig(DEMO),) if options.objective == "reward" else ()
    return train_refiner(TrainConfig(out, run, refiner=options, rewards=rewards), device)


def train_refiner(config: TrainConfig, device: torch.device) -> Path:
    """Start or continue a training, write the result and return its path."""
    stage, base = prepare(config, device)
    options = stage.options
    train(stage, LoopOptions(config.run, options.steps, config.save_every, config.show_every))
    pairs = stage.average()
    if not is_first():
        return config.out
    if options.method == "lora":
        metadata = {"steps": str(options.steps), "objective": options.objective}
        save_lora(config.out, pairs, metadata)
    else:
        save_refiner(config.out, pairs, card_of(options, base))
    return config.out


def card_of(options: RefineOptions, base: str) -> RefinerCard:
    """Describe a trained refiner; `base` is the fingerprint of its base model."""
    return RefinerCard(
        rank=options.rank,
        levels=tuple(sorted(options.refined, reverse=True)),
        history=options.cache.history,
        previous=options.cache.previous,
        base=base,
        objective=options.objective,
        steps=options.steps,
    )


def run_probe(path: Path, device: torch.device, batches: int) -> Probe:
    """Probe the training that a file describes, in the current state of its run.

    Runs the critic's warm-up before, if it is missing, and saves it.
    """
    config = TrainConfig.read(path)
    stage, _ = prepare(config, device)
    warm_up = stage.options.first_update
    if restore(stage, config.run) < warm_up:
        stage.show = nothing_shown
        train(stage, LoopOptions(config.run, warm_up, config.save_every, warm_up))
    return probe(stage, batches)


def nothing_shown(folder: Path, index: int) -> dict[str, float]:
    """Draw no sheet: the refiner is still untrained."""
    return {}


def prepare(config: TrainConfig, device: torch.device) -> tuple[RefinerStage, str]:
    """Start or continue a run; return its stage and the fingerprint of the base model."""
    if not config.out.parent.is_dir():
        raise ValueError(f"{config.out.parent} is not a folder: make it, `out` is written there")
    if device.type == "cpu":
        keep_freed_memory()
    stage = make_stage(config, device)
    options = stage.options
    if is_first():
        several = f", in {world()} processes" if world() > 1 else ""
        warn(f"{options.method}: {options.steps} steps on {device} in {config.run}{several}")
    weights = {name: whole(stage.base.model.get_parameter(name)) for name in FINGERPRINTED}
    base = fingerprint_of(weights)
    begin(config.run, run_identity(config, base, stage.prompts), MAY_CHANGE, first=is_first())
    return stage, base


def run_identity(config: TrainConfig, base: str, prompts: Sequence[str]) -> dict[str, Any]:
    """Return everything that a run depends on, except the places of its files."""
    rewards = [asdict(reward) for reward in config.rewards]
    for reward in rewards:
        del reward["path"]
    models = {"text encoder": text_encoder_file(config)}
    if config.refiner.objective == "dmd":
        models["teacher"] = teacher_file(config.teacher)
    else:
        models["vae"] = vae_file(config.vae)
    return {
        **asdict(config.refiner),
        "first update": config.refiner.first_update,  # depends on the steps, which may change
        "base": base,
        "prompts": digest(prompts),
        "rewards": rewards,
        **{name: seal(path) for name, path in models.items()},
        "reward models": [seal(reward.file) for reward in config.rewards],
    }


def seal(path: Path) -> str:
    """Hash the size and the first MiB of a model's file, or of each file in its folder."""
    hashed = hashlib.sha256()
    paths = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    for each in paths:
        with open_regular(each) as file:
            hashed.update(f"{each.stat().st_size} ".encode() + file.read(1 << 20))
    return hashed.hexdigest()


def make_stage(config: TrainConfig, device: torch.device) -> RefinerStage:
    """Load and check everything that a training needs."""
    prompts, unseen = split_prompts(config)
    bundle = find_training_bundle(config.base)
    base = load_network(bundle.model if bundle else Path(config.base), device)
    reads_prompts = bundle and not config.text_encoder
    if reads_prompts and find_training_bundle(config.prompts) is None:
        warn_of_misread(bundle, prompts)
    encode = make_encoder(config, base, device)
    vae = load_vae(vae_file(config.vae), device)
    objective = make_objective(config, base, encode, vae)
    show = gather_only
    if is_first():
        show = make_sheets(bundle, base, encode, vae, prompts)
    return RefinerStage(config.refiner, base, objective, prompts, encode, show, unseen)


def split_prompts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Read the prompts to train on and the held-out ones."""
    prompts = read_prompts(config.prompts)
    if bundle := find_training_bundle(config.prompts):
        return prompts, bundle.training.held_out(HELD_OUT)
    return hold_out(prompts)


def read_prompts(name: str) -> list[str]:
    """Read the prompts of a UTF-8 file or of a bundle; ValueError for an empty file."""
    if bundle := find_training_bundle(name):
        return bundle.training.prompts(BUNDLED_PROMPTS)
    path = Path(name)
    if not path.exists():
        raise ValueError(f"{path} is not there: `prompts` names a text file with a prompt a line")
    lines = [line.strip() for line in read_text(path, LINES_BYTES).splitlines()[:MAX_PROMPTS]]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} is empty: write a prompt a line")
    return prompts


def hold_out(prompts: list[str]) -> tuple[list[str], list[str]]:
    """Hold out the last tenth of the prompts, at most 16, for comparisons with the base model."""
    count = min(HELD_OUT, len(prompts) // 10)
    return prompts[: len(prompts) - count], prompts[len(prompts) - count :]


def warn_of_misread(bundle: Bundle, prompts: Sequence[str]) -> None:
    """Warn once if prompts differ from the captions that a bundle was trained on."""
    noted = {prompt: lines for prompt in prompts if (lines := bundle.prompt_notes(prompt))}
    count = sum(prompt in noted for prompt in prompts)
    if not noted:
        return
    prompt, lines = next(iter(noted.items()))
    warnings.warn(
        f"{count} of {len(prompts)} prompts are not like the captions of {bundle.name}, such as"
        f" {prompt[:40]!r}: {lines[0]}",
        stacklevel=2,
    )


def make_encoder(config: TrainConfig, base: CausalWan, device: torch.device) -> Encode:
    """Load the text encoder; return a function from prompts to contexts [B, L, text_dim]."""
    bundle = find_training_bundle(config.base)
    if bundle and not config.text_encoder:
        return bundle.text(device)
    encoder = load_text_encoder(
        text_encoder_file(config),
        Path(config.tokenizer) if config.tokenizer else None,
        device=device,
        text_len=base.config.text_len,
        cache_dir=config.run / "contexts",
    )
    return lambda prompts: encoder.encode(prompts).to(device)


def text_encoder_file(config: TrainConfig) -> Path:
    """Return the file or folder of the text encoder; ValueError if the base needs one."""
    bundle = find_training_bundle(config.base)
    if bundle and not config.text_encoder:
        return bundle.training.text
    if not config.text_encoder:
        raise ValueError(
            "`text_encoder` is not said: name the umT5 folder or file that the base was trained"
            " with"
        )
    return Path(config.text_encoder)


def teacher_file(name: str) -> Path:
    """Return the file of a teacher, which may be named by its bundle."""
    bundle = find_training_bundle(name)
    return bundle.training.teacher if bundle else Path(name)


def vae_file(name: str) -> Path:
    """Return the file of a VAE, which may be named by its bundle."""
    bundle = find_training_bundle(name)
    return bundle.vae if bundle else Path(name)


def load_network(path: Path, device: torch.device) -> CausalWan:
    """Load a transformer in fp32."""
    model, info = load_transformer(path, device=device, dtype=torch.float32)
    return CausalWan(model, info.config)


def load_vae(path: Path, device: torch.device) -> WanVAE:
    """Load a VAE in fp32."""
    return WanVAE.from_state_dict(load_vae_state(path)).to(device, torch.float32)


def make_objective(config: TrainConfig, base: CausalWan, encode: Encode, vae: WanVAE) -> Objective:
    """Load the reward models or the teacher."""
    device = vae.conv1.weight.device
    if config.refiner.objective == "reward":
        rewards = Mixture(tuple((reward.load(device), reward.weight) for reward in config.rewards))
        return RewardObjective(config.refiner, rewards, vae)
    teacher = load_network(teacher_file(config.teacher), device)
    base_inputs = base.config.in_dim, base.config.text_dim
    if base_inputs != (teacher.config.in_dim, teacher.config.text_dim):
        raise ValueError(
            "base and teacher differ in latents or text encoder: train with a teacher of the base's"
            " kind"
        )
    return DmdObjective(config.refiner, teacher, encode)


def make_sheets(
    bundle: Bundle | None, base: CausalWan, encode: Encode, vae: WanVAE, prompts: list[str]
) -> Show:
    """Make sample sheets of the first prompts, or those of the base's bundle."""
    if bundle:
        return bundle.training.sheets(base, encode, vae)
    return Sheets(base, encode, vae, prompts[:SHEET_PROMPTS])
