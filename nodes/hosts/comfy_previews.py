"""Pictures of latents while they are sampled, without a VAE: by a tiny decoder or a linear map."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import comfy.model_management as management
import folder_paths
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ...refiner.rollout import Progress
from ...refiner.wan.tiny_vae import TinyVAE, load_tiny_vae
from ...refiner.wan.vae_layers import StreamState
from .page import Pictures, notice

TINY = "autorefiner.tiny"  # attachment of a MODEL: the tiny decoder of its latents
FOLDER = "vae_approx"
RAW = {"taew2_1": False, "lighttaew2_1": True}  # file names begin so; latents are normalised or raw
SHARE = 0.1  # of the time may go into pictures of unfinished chunks
STATES = 2  # of a chunk's start and of its end
CELL = 8  # pixels of a latent's side


class TinyDecoder(Protocol):
    """A module that decodes the next latents of a video; the state continues earlier calls."""

    def decode(self, latents_BCfhw: Tensor, state: StreamState | None = None) -> Tensor: ...

    def parameters(self) -> Iterator[Tensor]: ...


def pictures_of(model: ModelPatcher) -> Pictures:
    """Return what draws a MODEL's latents on the page: a tiny decoder, or else a linear map."""
    tiny = model.get_attachment(TINY) or read_decoder(model.load_device)
    linear = LinearPictures(type(model.model.latent_format)())  # not as `preview_by` leaves it
    return linear if tiny is None else TinyPictures(tiny, linear)


def previews_wanted() -> bool:
    """Whether ComfyUI shows its own previews of running nodes."""
    return args.preview_method != LatentPreviewMethod.NoPreviews


def read_decoder(device: torch.device) -> TinyVAE | None:
    """Load a decoder of Wan2.1's latents from models/vae_approx; None without a usable file."""
    for name in folder_paths.get_filename_list(FOLDER):
        kind = next((kind for kind in RAW if name.startswith(kind)), None)
        if kind is None or not name.endswith(".safetensors"):
            continue
        try:
            tiny = load_tiny_vae(folder_paths.get_full_path_or_raise(FOLDER, name), RAW[kind])
        except (ValueError, OSError) as error:
            notice(f"previews go without {name}: {error}")
            continue
        half = not management.is_device_cpu(device)
        return tiny.to(device, torch.float16 if half else torch.float32)
    return None


def preview_by(model: ModelPatcher, tiny: TinyDecoder) -> None:
    """Let the strip and ComfyUI's own previews draw the latents of a just loaded MODEL by `tiny`.

    ComfyUI maps latents linearly to colours, after a function that the format may bring.
    """
    model.set_attachments(TINY, tiny)
    latents = model.model.latent_format  # this model's alone
    latents.latent_rgb_factors = torch.eye(3).tolist()
    latents.latent_rgb_factors_bias = [0.0, 0.0, 0.0]
    latents.latent_rgb_factors_reshape = lambda x0: decoded(tiny, x0[:1, :, :1])[:, :, -1:].to(x0)


@torch.inference_mode()
def decoded(tiny: TinyDecoder, latents: Tensor, state: StreamState | None = None) -> Tensor:
    """Decode to pixels [B, 3, F, H, W] in [-1, 1] on the decoder's device."""
    device = next(tiny.parameters()).device
    return tiny.decode(latents.to(device), state).clamp(-1, 1)


def image_of(pixels_CHW: Tensor) -> Image.Image:
    return latent_preview.preview_to_image(pixels_CHW.float().movedim(0, -1))


class LinearPictures:
    """ComfyUI's linear map of a latent to a colour, at the size of the decoded frame."""

    def __init__(self, latents: LatentFormat) -> None:
        self.previewer = latent_preview.Latent2RGBPreviewer(
            latents.latent_rgb_factors,
            latents.latent_rgb_factors_bias,
            latents.latent_rgb_factors_reshape,
        )

    def show(self, progress: Progress, finished: bool) -> None:
        """Any frame is drawn alike."""

    def __call__(self, latent: Tensor) -> Image.Image:
        image = self.previewer.decode_latent_to_preview(latent)
        return image.resize((CELL * image.width, CELL * image.height), Image.Resampling.BICUBIC)


class TinyPictures:
    """A tiny decoder that goes on from chunk to chunk.

    Finished chunks are always decoded, others as long as that takes at most SHARE of the time;
    between, the last pictures of the chunk stand. After an error, as for want of memory, the run
    goes on with the pictures of `linear`.
    """

    def __init__(
        self,
        tiny: TinyDecoder,
        linear: Pictures,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tiny, self.linear, self.clock = tiny, linear, clock
        self.failed = False
        self.states: dict[int, StreamState] = {}  # by the latent frame that comes next
        self.start = -1  # of the chunk that the pictures show
        self.latents: Tensor | None = None  # [1, C, f, h, w], of the last prediction
        self.images: list[Image.Image] = []
        self.due = 0.0
        self.stale = False

    def show(self, progress: Progress, finished: bool) -> None:
        if progress.chunk.start != self.start or finished or self.clock() >= self.due:
            self.start, self.stale = progress.chunk.start, True
        self.latents = progress.x0[:1]

    def __call__(self, latent: Tensor) -> Image.Image:
        try:
            if not self.failed:
                return self._draw(latent)
        except Exception as error:
            self.failed = True
            self.states.clear()
            notice(f"previews go on without their decoder: {error}")
        return self.linear(latent)

    def _draw(self, latent: Tensor) -> Image.Image:
        index = self._index(latent)
        if index is None:  # a frame of another chunk, without its past
            return image_of(decoded(self.tiny, latent[:1])[0, :, -1])
        if self.stale:
            self._decode()
        return self.images[index]

    def _index(self, latent: Tensor) -> int | None:
        if self.latents is None or latent.shape[3:] != self.latents.shape[3:]:
            return None
        same = (self.latents == latent[:1].to(self.latents)).all(dim=1).flatten(2).all(dim=2)
        return int(same[0].int().argmax()) if same.any() else None

    def _decode(self) -> None:
        """Decode the chunk after the past of its start, and keep the past of its end."""
        begun = self.clock()
        state = self.states.get(self.start, StreamState()).clone()
        frames = decoded(self.tiny, self.latents, state)
        last = range(frames.shape[2] - 1, -1, -4)  # each latent's last frame
        self.images = [image_of(frames[0, :, index]) for index in reversed(last)]
        self.states[self.start + self.latents.shape[2]] = state
        while len(self.states) > STATES:
            del self.states[next(iter(self.states))]
        self.stale = False
        self.due = self.clock() + (self.clock() - begun) / SHARE
