"""Frames and video files in ComfyUI: decode piecewise, name in its folders, show on its page."""

import json
import os
import time
import uuid
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import comfy.ldm.wan.vae
import comfy.model_management as management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import Input, InputImpl, io, ui
from torch import Tensor, nn

from ...refiner.files import unused_path
from ...refiner.video import VideoWriter, as_bytes
from ..paths import dated, inside
from ..run import CHANNELS
from .page import show

PAIR = "autorefiner_compare"  # what web/compare.js looks for in a node's output
GROUP = 8  # frames between key frames


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


def decode(vae: comfy.sd.VAE, raw_1CFhw: Tensor) -> Iterator[Tensor]:
    """Decode one latent frame, then two at a time.

    Since ComfyUI 0.18 the decoder's cache lacks a frame after a later call with a single latent
    frame, so only the last call may have one.
    """
    model = wan_vae(vae)
    shape = (1, CHANNELS, min(3, raw_1CFhw.shape[2]), *raw_1CFhw.shape[3:])
    nbytes = vae.memory_used_decode(shape, vae.vae_dtype)
    management.load_models_gpu([vae.patcher], memory_required=nbytes)
    z = model.conv2(raw_1CFhw.to(vae.device, vae.vae_dtype))
    pieces = [z[:, :, :1], *z[:, :, 1:].split(2, dim=2)] if z.shape[2] > 1 else [z]
    cache: list = [None] * cache_layers(model.decoder)
    bar = comfy.utils.ProgressBar(len(pieces))
    for piece in pieces:
        management.throw_exception_if_processing_interrupted()
        pixels = model.decoder(piece, feat_cache=cache, feat_idx=[0])
        if isinstance(pixels, list):
            pixels = torch.cat(pixels, dim=2)
        yield vae.process_output(pixels[0].float()).permute(1, 2, 3, 0).cpu()
        bar.update(1)


def encode(vae: comfy.sd.VAE, images_FHWC: Tensor) -> Tensor:
    wan_vae(vae)
    return vae.encode(images_FHWC)


def cache_layers(decoder: nn.Module) -> int:
    """Number of layers that cache frames between calls, by either name of ComfyUI's function."""
    vae = comfy.ldm.wan.vae
    count = getattr(vae, "count_cache_layers", None) or vae.count_conv3d  # before 0.18
    return count(decoder)


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
