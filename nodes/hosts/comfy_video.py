"""Frames and video files in ComfyUI: decode piecewise, name in its folders, show on its page."""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from weakref import WeakKeyDictionary

import comfy.ldm.wan.vae
import comfy.model_management as management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import Input, InputImpl, io, ui
from torch import Tensor, nn

from ...refiner.files import unused_path
from ...refiner.video import VideoWriter, as_bytes
from ...refiner.wan.vae import DecoderState, WanVAE
from ..paths import dated, inside
from .page import show

PAIR = "autorefiner_compare"  # what web/compare.js looks for in a node's output
GROUP = 8  # frames between key frames
PIECE = 3  # latent frames decoded together

_decoders: WeakKeyDictionary[nn.Module, ModelPatcher] = WeakKeyDictionary()  # by ComfyUI's module


def wan_vae(vae: comfy.sd.VAE) -> nn.Module:
    """Return the modules of a VAE; ValueError for a VAE that is not Wan2.1's."""
    model = vae.first_stage_model
    if not isinstance(model, comfy.ldm.wan.vae.WanVAE):
        raise ValueError(
            f"vae is a {type(model).__name__} and not Wan2.1's: use that, or the nodes of its own"
            " kind"
        )
    return model


def vae_width(vae: comfy.sd.VAE) -> int:
    return len(wan_vae(vae).decoder.head[0].gamma)


@torch.inference_mode()
def decoder_of(vae: comfy.sd.VAE) -> ModelPatcher:
    """Return the pack's decoder with a VAE's weights, loaded and counted like any other model.

    On the CPU, and wherever they are not loaded, both have the same tensors. Reads raw latents.
    """
    model = wan_vae(vae)
    if model not in _decoders:
        decoder = WanVAE.from_state_dict(model.state_dict(), latent_mean=0.0, latent_std=1.0)
        del decoder.encoder, decoder.conv1
        decoder = decoder.to(vae.vae_dtype).requires_grad_(False)
        offload = vae.patcher.offload_device
        _decoders[model] = ModelPatcher(decoder, load_device=vae.device, offload_device=offload)
    return _decoders[model]


@torch.inference_mode()
def load_decoder(vae: comfy.sd.VAE, nbytes: int) -> None:
    """Load a VAE's decoder with room for `nbytes` of activations."""
    # Its layers are plain modules, which cannot run half loaded.
    management.load_models_gpu([decoder_of(vae)], memory_required=nbytes, force_full_load=True)


@torch.inference_mode()
def stream_decoder(vae: comfy.sd.VAE) -> Callable[[Tensor], Tensor]:
    """Begin to decode one clip: a function of the raw latents [1, 16, f, h, w] of the next chunk.

    It returns their frames [F, H, W, 3] in [0, 1], fp32 on the CPU. Loads the decoder where it is
    not loaded yet, so call it before the model of a run, or load `decoder_of` together with that.
    """
    patcher, state = decoder_of(vae), DecoderState()
    if patcher.loaded_size() < patcher.model_size():
        load_decoder(vae, 0)

    @torch.inference_mode()
    def decode_next(raw_1CFhw: Tensor) -> Tensor:
        pixels = patcher.model.decode(raw_1CFhw.to(vae.device, vae.vae_dtype), state)
        return vae.process_output(pixels[0].float()).permute(1, 2, 3, 0).cpu()

    return decode_next


def decode(vae: comfy.sd.VAE, raw_1CFhw: Tensor) -> Iterator[Tensor]:
    """Decode a few latent frames at a time, with a progress bar and ComfyUI's interrupts."""
    pieces = raw_1CFhw.split(PIECE, dim=2)
    load_decoder(vae, vae.memory_used_decode(pieces[0].shape, vae.vae_dtype))
    decode_next = stream_decoder(vae)
    bar = comfy.utils.ProgressBar(len(pieces))
    for piece in pieces:
        management.throw_exception_if_processing_interrupted()
        yield decode_next(piece)
        bar.update(1)


def encode(vae: comfy.sd.VAE, images_FHWC: Tensor) -> Tensor:
    wan_vae(vae)
    return vae.encode(images_FHWC)


def output_path(prefix: str, suffix: str, width: int = 0, height: int = 0) -> Path:
    """Fill in the prefix's tokens here, so that it is checked before ComfyUI creates its folders.

    ComfyUI counts from 1 again for a prefix that ends in a slash, hence `unused_path`.
    """
    root = folder_paths.get_output_directory()
    prefix = dated(prefix, width, height, time.localtime())
    inside(Path(root), prefix, "filename_prefix")
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    return unused_path(Path(folder), name, suffix, counter)


def graph_metadata(hidden: io.HiddenHolder) -> dict[str, str]:
    """Return the prompt and the workflow, as core's SaveVideo writes them into a file."""
    if args.disable_metadata:
        return {}
    graphs = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        graphs["prompt"] = hidden.prompt
    return {name: json.dumps(graph) for name, graph in graphs.items()}


def video_file(path: Path) -> InputImpl.VideoFromFile:
    return InputImpl.VideoFromFile(str(path))


def show_video(path: Path) -> ui.PreviewVideo:
    folder = os.path.relpath(path.parent, folder_paths.get_output_directory())
    subfolder = "" if folder == "." else folder
    return ui.PreviewVideo([ui.SavedResult(path.name, subfolder, io.FolderType.output)])


def clip_size(clip: Tensor | Input.Video) -> tuple[int, int, int]:
    if isinstance(clip, Tensor):
        return clip.shape[0], clip.shape[2], clip.shape[1]
    return clip.get_frame_count(), *clip.get_dimensions()


def clip_frames(clip: Tensor | Input.Video, fps: float) -> tuple[np.ndarray, float | Fraction]:
    if isinstance(clip, Tensor):
        return as_bytes(clip), fps
    components = clip.get_components()
    return as_bytes(components.images), components.frame_rate


def show_pair(base: np.ndarray, refined: np.ndarray, fps: float | Fraction, text: str) -> dict:
    """Write both clips into ComfyUI's temporary folder, for web/compare.js to play."""
    folder = Path(folder_paths.get_temp_directory())
    name = f"autorefiner_{uuid.uuid4().hex}"
    files = []
    for kind, frames in (("base", base), ("refined", refined)):
        path = folder / f"{name}_{kind}.mp4"
        with VideoWriter(path, frames.shape[2], frames.shape[1], fps) as writer:
            for start in range(0, len(frames), GROUP):
                writer.write(frames[start : start + GROUP])
        place = ui.SavedResult(path.name, "", io.FolderType.temp)
        files.append({**place, "frames": len(frames), "fps": float(fps)})
    return {PAIR: files, **show(text).as_dict()}
