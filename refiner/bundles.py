"""The bundled models: one row each, with everything that sampling and training need."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .demo.bundle import FILES, REFINERS, WEIGHTS, load_sprite_reward, load_sprite_text
from .demo.captions import misread
from .demo.clips import Encode, held_out_prompts, training_prompts
from .demo.reward_model import FRAMES
from .demo.sheets import SpriteSheets
from .training.rewards.reward import FrameDraw, Reward
from .training.sheets import Show
from .wan.causal import CausalWan
from .wan.transformer import WAN_TINY, WanConfig
from .wan.vae import WanVAE

DEMO = "sprites"  # the bundle of a training file that names no other model
PUBLISHED_SIZE = (832, 480)  # pixels
SPRITES_SIZE = (64, 64)

ChooseFrames = Callable[[FrameDraw], FrameDraw]  # the frames a reward sees, given its usual ones


@dataclass(frozen=True, slots=True)
class TrainingKit:
    """Inputs of a refiner's training besides model, VAE and text encoder."""

    teacher: Path  # a bidirectional network on the same latents: the real score
    text: Path
    prompts: Callable[[int], list[str]]  # the first n training prompts
    held_out: Callable[[int], list[str]]  # the first n prompts that no model was trained on
    reward_file: Path
    reward: Callable[[ChooseFrames, torch.device | str], Reward]
    sheets: Callable[[CausalWan, Encode, WanVAE], Show]  # sample sheets with scores


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundled model. To add one, add a row to BUNDLES; no other code names it."""

    name: str
    model: Path | WanConfig  # a file, or the sizes of a network with random weights
    vae: Path | int  # a file, or the base width of a VAE with random weights
    text: Callable[[torch.device | str], Encode]
    notes: Callable[[str | None, int, int], list[str]]  # warnings on prompt, width, height
    size: tuple[int, int] = PUBLISHED_SIZE
    preset: str = "self-forcing"
    refiners: Mapping[str, Path] = field(default_factory=dict)
    training: TrainingKit | None = None  # None: trainings cannot use it

    def prompt_notes(self, prompt: str) -> list[str]:
        """Return warnings on a prompt at the size that the model was trained for."""
        return self.notes(prompt, *self.size)


def sprites(folder: Path = WEIGHTS) -> Bundle:
    """Describe the sprites demo, with its files in `folder`."""
    return Bundle(
        name="sprites",
        model=folder / FILES["student"],
        vae=folder / FILES["vae"],
        text=lambda device: load_sprite_text(folder).to(device),
        notes=sprite_notes,
        size=SPRITES_SIZE,
        refiners={name: folder / file for name, file in REFINERS.items()},
        training=TrainingKit(
            teacher=folder / FILES["teacher"],
            text=folder / FILES["text"],
            prompts=training_prompts,
            held_out=held_out_prompts,
            reward_file=folder / FILES["reward"],
            reward=lambda choose, device: load_sprite_reward(folder, choose(FRAMES), device),
            sheets=SpriteSheets,
        ),
    )


def random_tiny() -> Bundle:
    """Describe a tiny untrained model, to try the commands on any machine."""
    return Bundle(
        name="random-tiny",
        model=WAN_TINY,
        vae=8,
        text=lambda device: partial(random_context, WAN_TINY),
        notes=lambda prompt, width, height: ["random weights: the video is noise"],
    )


def sprite_notes(prompt: str | None, width: int, height: int) -> list[str]:
    """Warn of words and sizes that the sprites were not trained on.

    `prompt` is None where the run has a context instead.
    """
    if prompt is None:
        return []
    lines = misread(prompt)
    if (width, height) != SPRITES_SIZE:
        trained_at = "{}x{}".format(*SPRITES_SIZE)
        lines.append(f"the sprites were trained at {trained_at}: other sizes look wrong")
    return lines


def random_context(config: WanConfig, prompts: list[str]) -> Tensor:
    """Draw contexts [B, text_len, text_dim], each seeded by a hash of its prompt."""
    contexts = []
    for prompt in prompts:
        digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        contexts.append(torch.randn(config.text_len, config.text_dim, generator=generator))
    return torch.stack(contexts)


BUNDLES = {bundle.name: bundle for bundle in (sprites(), random_tiny())}


def find_bundle(name: str) -> Bundle | None:
    """Return the bundle of this name; None for a file."""
    return BUNDLES.get(name)


def find_training_bundle(name: str) -> Bundle | None:
    """Return the bundle of this name if trainings can use it, else None."""
    bundle = find_bundle(name)
    return bundle if bundle and bundle.training else None


def bundled_refiners() -> dict[str, Path]:
    """Return the files of all bundled refiners by name; they may be missing."""
    return {name: path for bundle in BUNDLES.values() for name, path in bundle.refiners.items()}


def refiner_file(name: str) -> Path | None:
    """Return the file of a bundled refiner; None for another name.

    Raises ValueError when the file is missing.
    """
    path = bundled_refiners().get(name)
    if path and not path.exists():
        raise ValueError(
            f"the bundle has no refiner {name} ({path} is not there): train one with autorefiner"
            " train"
        )
    return path
