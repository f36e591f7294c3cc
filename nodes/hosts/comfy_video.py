"""Frames and video files in ComfyUI: decoded a few at a time, named in its folders, shown on its page."""

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
GROUP = 8  # frames between two that a player can jump to at once


def wan_vae(vae: comfy.sd.VAE) -> nn.Module:
    """The modules of a VAE; ValueError for one that is not Wan2.1's."""
    model = vae.first_stage_model
    if not isinstance(model, comfy.ldm.wan.vae.WanVAE):
        raise ValueError(f"vae is a {type(model).__name__} and not Wan2.1's: use that, or the nodes of its own kind")
    return model


def vae_width(vae: comfy.sd.VAE) -> int:
    """The base width of a VAE, 96 for the published one."""
    return len(wan_vae(vae).decoder.head[0].gamma)


def decode(vae: comfy.sd.VAE, raw_1CFhw: Tensor) -> Iterator[Tensor]:
    """Frames [f, H, W, 3] in [0, 1], fp32 on the CPU, of one latent, then of two at a time.

    A later call of one latent is only right on the last one: the decoder's cache then lacks a frame (ComfyUI 0.18 on).
    """
    model = wan_vae(vae)
    shape = (1, CHANNELS, min(3, raw_1CFhw.shape[2]), *raw_1CFhw.shape[3:])
    management.load_models_gpu([vae.patcher], memory_required=vae.memory_used_decode(shape, vae.vae_dtype))
    z = model.conv2(raw_1CFhw.to(vae.device, vae.vae_dtype))
    pieces = [z[:, :, :1], *z[:, :, 1:].split(2, dim=2)] if z.shape[2] > 1 else [z]
    cache: list = [None] * cache_layers(model.decoder)
    bar = comfy.utils.ProgressBar(len(pieces))
    for piece in pieces:
        management.throw_exception_if_processing_interrupted()
        made = model.decoder(piece, feat_cache=cache, feat_idx=[0])
        pixels = torch.cat(made, dim=2) if isinstance(made, list) else made
        yield vae.process_output(pixels[0].float()).permute(1, 2, 3, 0).cpu()
        bar.update(1)


def cache_layers(decoder: nn.Module) -> int:
    """Places that a Wan decoder keeps frames in between calls; the function's name changed in ComfyUI 0.18."""
    counts = ("count_cache_layers", "count_conv3d")
    return next(getattr(comfy.ldm.wan.vae, name) for name in counts if hasattr(comfy.ldm.wan.vae, name))(decoder)


def output_path(prefix: str, suffix: str, width: int = 0, height: int = 0) -> Path:
    """A new path in the output folder: PREFIX_00001_.mp4, counted on; ValueError where a link leads out of it.

    That is known before ComfyUI makes the folders of the prefix, so its tokens are filled in here. ComfyUI starts at 1
    again for a prefix that ends in a slash.
    """
    root = folder_paths.get_output_directory()
    prefix = dated(prefix, width, height, time.localtime())
    inside(Path(root), prefix, "filename_prefix")
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    return unused_path(Path(folder), name, suffix, counter)


def graph_metadata(hidden: io.HiddenHolder) -> dict[str, str]:
    """The prompt and the workflow of a node's run, as core's SaveVideo puts them into a file."""
    if args.disable_metadata:
        return {}
    graphs = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        graphs["prompt"] = hidden.prompt
    return {name: json.dumps(graph) for name, graph in graphs.items()}


def video_file(path: Path) -> InputImpl.VideoFromFile:
    """A VIDEO of a file."""
    return InputImpl.VideoFromFile(str(path))


def show_video(path: Path) -> ui.PreviewVideo:
    """The video, played on the node."""
    folder = os.path.relpath(path.parent, folder_paths.get_output_directory())
    return ui.PreviewVideo([ui.SavedResult(path.name, "" if folder == "." else folder, io.FolderType.output)])


def clip_size(clip: Tensor | Input.Video) -> tuple[int, int, int]:
    """(frames, width, height) of IMAGE or VIDEO."""
    if isinstance(clip, Tensor):
        return clip.shape[0], clip.shape[2], clip.shape[1]
    return clip.get_frame_count(), *clip.get_dimensions()


def clip_frames(clip: Tensor | Input.Video, fps: float) -> tuple[np.ndarray, float | Fraction]:
    """uint8 frames [F, H, W, 3] of IMAGE or VIDEO, and their rate: `fps`, unless a VIDEO brings its own."""
    if isinstance(clip, Tensor):
        return as_bytes(clip), fps
    parts = clip.get_components()
    return as_bytes(parts.images), parts.frame_rate


def show_pair(base: np.ndarray, refined: np.ndarray, fps: float | Fraction, text: str) -> dict:
    """What plays two clips in step on the node: files in ComfyUI's folder of what is not kept, and a line of text."""
    folder, name = Path(folder_paths.get_temp_directory()), f"autorefiner_{uuid.uuid4().hex}"
    shown = []
    for kind, frames in (("base", base), ("refined", refined)):
        path = folder / f"{name}_{kind}.mp4"
        with VideoWriter(path, frames.shape[2], frames.shape[1], fps) as writer:
            for start in range(0, len(frames), GROUP):
                writer.write(frames[start : start + GROUP])
        shown.append({**ui.SavedResult(path.name, "", io.FolderType.temp), "frames": len(frames), "fps": float(fps)})
    return {PAIR: shown, **show(text).as_dict()}
