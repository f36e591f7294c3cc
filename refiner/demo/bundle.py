"""The sprites' models as files: bf16 safetensors with their recipe and scores."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..noise.file import load_refiner
from ..noise.refiner import Refiner, merged
from ..training.rewards.reward import FrameDraw
from ..training.rewards.video_text import VideoTextReward
from ..wan.causal import CausalWan
from ..wan.checkpoint import load_transformer, load_vae_state, save_safetensors
from ..wan.transformer import WanConfig
from ..wan.vae import LATENT_MEAN, LATENT_STD, WanVAE
from ..wan.weight_file import FLAT, open_weights
from .reward_model import FRAMES, SpriteVideoText
from .text_encoder import SpriteTextEncoder
from .tiny_decoder import SpriteTinyDecoder

WEIGHTS = Path(__file__).parent / "weights"
REFINERS = {"sprites": "sprites.refiner.safetensors"}  # trained by distribution matching
MODELS = ("vae", "tiny", "text", "teacher", "student", "reward")
FILES = {name: f"sprites_{name}.safetensors" for name in MODELS}


def scaled_vae(vae: WanVAE, mean: Tensor, std: Tensor) -> WanVAE:
    """Rescale latents of raw `mean` and `std` [16] to the statistics that Wan's constants assume.

    Folds the scale into the two 1x1x1 convolutions around the latent; pixels stay the same.
    """
    weights = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    scale = torch.tensor(LATENT_STD) / std
    offset = torch.tensor(LATENT_MEAN) - scale * mean
    both = torch.cat((scale, torch.ones_like(scale)))
    weights["conv1.weight"] *= both[:, None, None, None, None]
    weights["conv1.bias"] = weights["conv1.bias"] * both + torch.cat((offset, 2 * scale.log()))
    weights["conv2.bias"] -= weights["conv2.weight"][..., 0, 0, 0] @ (offset / scale)
    weights["conv2.weight"] /= scale[None, :, None, None, None]
    return WanVAE.from_state_dict(weights)


def save_model(
    folder: Path, name: str, model: nn.Module, config: WanConfig | None, recipe: dict
) -> Path:
    """Write a model in bf16 with its recipe, steps and scores; ComfyUI needs the config."""
    metadata = {"autorefiner": json.dumps(recipe)}
    if config is not None:
        causal = {"causal_ar": True} if name == "student" else {}  # ComfyUI knows no false value
        metadata["config"] = json.dumps({"transformer": {**causal, **asdict(config)}})
    tensors = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / FILES[name], tensors, metadata)
    return folder / FILES[name]


def load_sprite_vae(folder: Path = WEIGHTS) -> WanVAE:
    """Load the VAE, fp32."""
    state = load_vae_state(folder / FILES["vae"])
    weights = {name: tensor.float() for name, tensor in state.items()}
    return WanVAE.from_state_dict(weights).requires_grad_(False)


def load_sprite_tiny(folder: Path = WEIGHTS) -> SpriteTinyDecoder:
    """Load the tiny decoder of previews, fp32."""
    file = open_weights(folder / FILES["tiny"])
    weights = {name: file.read(FLAT, name).float() for name in file.groups[FLAT]}
    tiny = SpriteTinyDecoder(len(weights["near.weight"]))
    tiny.load_state_dict(weights)
    return tiny.eval().requires_grad_(False)


def load_sprite_text(folder: Path = WEIGHTS) -> SpriteTextEncoder:
    """Load the text encoder, fp32."""
    file = open_weights(folder / FILES["text"])
    text_len, dim = file.groups[FLAT]["position"].shape
    encoder = SpriteTextEncoder(dim, text_len)
    encoder.load_state_dict({name: file.read(FLAT, name).float() for name in file.groups[FLAT]})
    return encoder.eval().requires_grad_(False)


def load_sprite_network(
    name: str, folder: Path = WEIGHTS, device: torch.device | str = "cpu"
) -> CausalWan:
    """Load the teacher or the student, fp32."""
    model, info = load_transformer(folder / FILES[name], dtype=torch.float32, device=device)
    return CausalWan(model, info.config)


def load_sprite_reward(
    folder: Path = WEIGHTS, frames: FrameDraw = FRAMES, device: torch.device | str = "cpu"
) -> VideoTextReward:
    """Load the text-video reward, fp32; ValueError if it is missing."""
    path = folder / FILES["reward"]
    if not path.exists():
        raise ValueError(
            f"{path} is not there: make it with `autorefiner demo train reward`, or use another"
            " reward"
        )
    file = open_weights(path)
    weights = {name: file.read(FLAT, name).float() for name in file.groups[FLAT]}
    text_len, text_dim = weights["captions.position"].shape
    model = SpriteVideoText(len(weights["from_text.weight"]), text_dim, text_len)
    model.load_state_dict(weights)
    return VideoTextReward("sprites", model.eval().requires_grad_(False).to(device), frames)


def bundled_refiner(student: CausalWan, folder: Path = WEIGHTS) -> Refiner:
    """Load the bundle's refiner, merged into a copy of its base."""
    pairs, card = load_refiner(folder / REFINERS["sprites"])
    return Refiner(merged(student, pairs), card.cache, frozenset(card.levels))


def recipe_of(name: str, folder: Path = WEIGHTS) -> dict:
    """Read the recipe, steps and scores from a model's file."""
    metadata = open_weights(folder / FILES[name]).metadata
    return json.loads(metadata.get("autorefiner", "{}"))
