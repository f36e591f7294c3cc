"""Image rewards of the CLIP family: how well single frames fit the prompt.

A model's folder is what `CLIPModel.save_pretrained` writes, in safetensors, with the tokenizer and
preprocessor_config.json. Frames are preprocessed in torch, so that gradients reach them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reading import CONFIG_BYTES, check_regular, read_json
from .reward import FrameDraw

PIP_LINE = 'pip install "transformers>=4.50.3"'
FILTERS = {2: "bilinear", 3: "bicubic"}  # by PIL's number
SINGLE = FrameDraw(2)  # two frames per step, as in the paper


@dataclass(frozen=True, slots=True)
class Formula:
    """A score from the image-text cosine and the model's logit scale, with its range."""

    score: Callable[[Tensor, float], Tensor]
    range: Callable[[float], tuple[float, float]]


# fmt: off
FORMULAS: dict[str, Formula] = {
    # 2.5 · max(cos, 0), Hessel et al. 2021
    "clip": Formula(lambda cosine, scale: 2.5 * cosine.clamp_min(0), lambda scale: (0.0, 2.5)),
    # PickScore: scale · cos, Kirstain et al. 2023
    "pick": Formula(lambda cosine, scale: scale * cosine,            lambda scale: (-scale, scale)),
    # HPSv2.1: cos, Wu et al. 2023
    "hps":  Formula(lambda cosine, scale: cosine,                    lambda scale: (-1.0, 1.0)),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize the shorter side, or both; crop the centre; normalise. Sizes are (height, width)."""

    shortest: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path) -> "Preprocessing":
        """Read preprocessor_config.json; ValueError if it is missing or unsupported."""
        path = folder / "preprocessor_config.json"
        try:
            config = read_json(path, CONFIG_BYTES)
            size = _size(config["size"]) if config.get("do_resize", True) else {}
            crop = _size(config["crop_size"]) if config.get("do_center_crop", True) else {}
            both_sides = size and "shortest_edge" not in size
            return cls(
                shortest=size.get("shortest_edge"),
                size=(size["height"], size["width"]) if both_sides else None,
                crop=(crop["height"], crop["width"]) if crop else None,
                mode=FILTERS[config.get("resample", 3)],
                mean=tuple(map(float, config["image_mean"])),
                std=tuple(map(float, config["image_std"])),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not say how CLIP takes pictures ({error!r}): use the model's own"
            ) from error

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Preprocess images [N, 3, H, W] in 0–1."""
        images, (height, width) = images_NCHW.float(), images_NCHW.shape[-2:]
        size = self.size
        if self.shortest is not None:
            short = self.shortest
            long = int(short * max(height, width) / min(height, width))
            size = (short, long) if height <= width else (long, short)
        if size is not None and size != (height, width):
            images = F.interpolate(
                images, size, mode=self.mode, antialias=True, align_corners=False
            )
            images = images.clamp(0, 1)
        if self.crop is not None:
            top, left = (
                (side - wanted) // 2
                for side, wanted in zip(images.shape[-2:], self.crop, strict=True)
            )
            if min(top, left) < 0:
                raise ValueError(
                    f"frames of {tuple(images.shape[-2:])} are smaller than CLIP's crop {self.crop}"
                )
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std


def _size(value: Any) -> Mapping[str, int]:
    """Read a size; in older configurations an int: the shorter side, or both sides of a crop."""
    if isinstance(value, int):
        return {"shortest_edge": value, "height": value, "width": value}
    return dict(value)


class ClipReward:
    """The frames' mean score by one of FORMULAS, under a frozen CLIP."""

    def __init__(
        self, name: str, model: nn.Module, tokenizer: Callable, preprocess: Preprocessing,
        frames: FrameDraw = SINGLE,
    ) -> None:  # fmt: skip
        self.name, self.frames = name, frames
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.model = model.eval().requires_grad_(False)
        self.scale = model.logit_scale.exp().item()
        self.range = FORMULAS[name].range(self.scale)

    def __call__(
        self, frames_BFCHW: Tensor, numbers: Sequence[int], prompts: Sequence[str]
    ) -> Tensor:
        """Return scores [B]; see Reward."""
        batch = len(frames_BFCHW)
        image = self._project("vision", pixel_values=self.preprocess(frames_BFCHW.flatten(0, 1)))
        with torch.no_grad():
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                list(prompts), padding="max_length", truncation=True, max_length=length,
                return_tensors="pt",
            ).to(frames_BFCHW.device)  # fmt: skip
            text = self._project(
                "text", input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
        cosine = (image.unflatten(0, (batch, -1)) * text[:, None]).sum(-1)
        return FORMULAS[self.name].score(cosine, self.scale).mean(1)

    def _project(self, tower: str, **inputs: Tensor) -> Tensor:
        """Embed pictures or texts as unit vectors, fp32."""
        pooled = getattr(self.model, f"{tower}_model")(**inputs).pooler_output
        projection = (
            self.model.visual_projection if tower == "vision" else self.model.text_projection
        )
        return F.normalize(projection(pooled).float(), dim=-1)


def load_clip_reward(
    name: str, folder: Path, device: torch.device | str = "cpu", frames: FrameDraw = SINGLE
) -> ClipReward:
    """Load a reward by one of FORMULAS from a model's folder, without downloads or pickles.

    ValueError if the folder holds no CLIP in safetensors, or transformers is missing.
    """
    try:
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise ValueError(f"a CLIP reward needs transformers: {PIP_LINE}") from error
    config = folder / "config.json"
    try:
        kind = read_json(config, CONFIG_BYTES).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder} holds no model ({error}): name a CLIP's folder, as transformers saves it"
        ) from error
    if kind != "clip":
        raise ValueError(f"{folder} holds a model of type {kind!r}: a CLIP was asked for")
    for path in folder.iterdir():  # transformers would block on a pipe
        if not path.is_dir():
            check_regular(path)
    try:
        model = CLIPModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True
        ).float()
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{folder} cannot be read as a CLIP in safetensors ({reason}):"
            " save model and tokenizer with save_pretrained"
        ) from error
    return ClipReward(name, model.to(device), tokenizer, Preprocessing.read(folder), frames)
