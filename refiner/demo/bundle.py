"""The bundled models as files: trained runs in, bf16 safetensors with their recipe and scores out, and back."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..training.rewards.reward import FrameDraw
from ..training.rewards.video_text import VideoTextReward
from ..wan.causal import CausalWan
from ..wan.checkpoint import load_transformer, load_vae_state, save_safetensors
from ..wan.transformer import WanConfig
from ..wan.vae import LATENT_MEAN, LATENT_STD, WanVAE
from ..wan.weight_file import FLAT, open_weights
from .reward_model import FRAMES, SpriteVideoText
from .text_encoder import SpriteTextEncoder

WEIGHTS = Path(__file__).parent / "weights"
REFINERS = {  # by the name that chooses them: trained by distribution matching, and with the bundled reward
    "sprites": "sprites.refiner.safetensors",
    "sprites-reward": "sprites_reward.refiner.safetensors",
}
FILES = {name: f"sprites_{name}.safetensors" for name in ("vae", "text", "teacher", "student", "reward")}


def sprite_refiner_file(name: str) -> Path:
    """A bundled refiner, one of REFINERS; ValueError where the bundle does not have it."""
    path = WEIGHTS / REFINERS[name]
    if not path.exists():
        raise ValueError(f"the bundle has no refiner {name} ({path} is not there): train one with autorefiner train")
    return path


def scaled_vae(vae: WanVAE, mean: Tensor, std: Tensor) -> WanVAE:
    """The same VAE whose latents, of raw statistics `mean` and `std` [16], Wan's published constants normalise.

    The change of scale is folded into the two 1x1x1 convolutions around the latent; pixels stay the same.
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


def save_model(folder: Path, name: str, model: nn.Module, config: WanConfig | None, told: dict) -> Path:
    """Write a model of the bundle in bf16. `told` says recipe, steps and scores; a config makes ComfyUI load it."""
    metadata = {"autorefiner": json.dumps(told)}
    if config is not None:
        causal = {"causal_ar": True} if name == "student" else {}  # ComfyUI knows no false one
        metadata["config"] = json.dumps({"transformer": {**causal, **asdict(config)}})
    tensors = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / FILES[name], tensors, metadata)
    return folder / FILES[name]


def load_sprite_vae(folder: Path = WEIGHTS) -> WanVAE:
    """The bundled VAE, fp32."""
    weights = {name: tensor.float() for name, tensor in load_vae_state(folder / FILES["vae"]).items()}
    return WanVAE.from_state_dict(weights).requires_grad_(False)


def load_sprite_text(folder: Path = WEIGHTS) -> SpriteTextEncoder:
    """The bundled text encoder, fp32."""
    file = open_weights(folder / FILES["text"])
    text_len, dim = file.groups[FLAT]["position"].shape
    encoder = SpriteTextEncoder(dim, text_len)
    encoder.load_state_dict({name: file.read(FLAT, name).float() for name in file.groups[FLAT]})
    return encoder.eval().requires_grad_(False)


def load_sprite_network(name: str, folder: Path = WEIGHTS, device: torch.device | str = "cpu") -> CausalWan:
    """The bundled teacher or student, fp32."""
    model, info = load_transformer(folder / FILES[name], dtype=torch.float32, device=device)
    return CausalWan(model, info.config)


def load_sprite_reward(
    folder: Path = WEIGHTS, frames: FrameDraw = FRAMES, device: torch.device | str = "cpu"
) -> VideoTextReward:
    """The bundled text-video reward, fp32; ValueError where it was not made yet."""
    path = folder / FILES["reward"]
    if not path.exists():
        raise ValueError(f"{path} is not there: make it with `autorefiner demo train reward`, or use another reward")
    file = open_weights(path)
    weights = {name: file.read(FLAT, name).float() for name in file.groups[FLAT]}
    text_len, text_dim = weights["captions.position"].shape
    model = SpriteVideoText(len(weights["from_text.weight"]), text_dim, text_len)
    model.load_state_dict(weights)
    return VideoTextReward("sprites", model.eval().requires_grad_(False).to(device), frames)


def recipe_of(name: str, folder: Path = WEIGHTS) -> dict:
    """What a file of the bundle says of itself: recipe, steps, scores."""
    return json.loads(open_weights(folder / FILES[name]).metadata.get("autorefiner", "{}"))
