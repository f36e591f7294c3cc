"""NodeHost in ComfyUI: models by its loaders here, the rest from the files beside this one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import comfy.model_management as management
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import ComfyExtension, io
from torch import Tensor, nn

from ...refiner.noise.file import fingerprint_of
from ...refiner.wan.checkpoint import CheckpointInfo
from ..run_states import NOTICES
from . import page
from .comfy_model import (  # noqa: F401, of NodeHost
    BASE,
    PRESET,
    SIZE,
    accelerated,
    base_of,
    facts,
)
from .comfy_previews import preview_by, read_decoder
from .comfy_sampling import make_sampler, sample, settled  # noqa: F401, of NodeHost
from .comfy_training import (  # noqa: F401, of NodeHost
    encode_prompt,
    find_folder,
    list_folders,
    output_folder,
    own_network,
    own_vae,
    show_sheet,
    torch_device,
    train_watch,
    training,
)
from .comfy_video import (  # noqa: F401, of NodeHost
    clip_frames,
    clip_size,
    decode,
    encode,
    graph_metadata,
    output_path,
    show_pair,
    show_video,
    stream_decoder,
    vae_width,
    video_file,
)
from .live_route import add_live_routes
from .page import notice, show, stops  # noqa: F401, of NodeHost

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


def extension(
    nodes: Sequence[type[io.ComfyNode]], answers: Mapping[str, page.Answer]
) -> ComfyExtension:
    """The pack as ComfyUI loads it; `answers` are requests of the page, by name."""
    page.add_routes(answers)
    add_live_routes()

    class AutoRefiner(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return list(nodes)

    return AutoRefiner()


def list_files(folder: str) -> list[str]:
    return folder_paths.get_filename_list(folder)


def find_file(folder: str, name: str) -> Path:
    if name not in list_files(folder):
        raise ValueError(f"{name!r} is not in models/{folder}: put the file there and refresh")
    return Path(folder_paths.get_full_path_or_raise(folder, name))


def model_folder(folder: str) -> Path:
    if folder not in folder_paths.folder_names_and_paths:
        return Path(folder_paths.models_dir) / folder
    return Path(folder_paths.get_folder_paths(folder)[0])


def load_patcher(
    path: str, dtype: str, weights: str, causal: bool = True, disable_dynamic: bool = False
) -> ModelPatcher:
    """Load a published Wan2.1 file. ComfyUI calls this again when it needs an unpatched copy."""
    from ...refiner.wan.checkpoint import read_transformer

    state, info = read_transformer(path, weights=weights)
    sizes = asdict(info.config)
    if causal:  # ComfyUI's other models do not take this key, not even as False
        sizes["causal_ar"] = True
    metadata = {**info.metadata, "config": json.dumps({"transformer": sizes})}
    options = {"dtype": DTYPES[dtype]} if dtype in DTYPES else {}
    base = fingerprint_of(state)  # before ComfyUI casts the weights, maybe to fewer bits
    loaded = comfy.sd.load_diffusion_model_state_dict(
        state, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if loaded is None:
        raise ValueError(
            f"{path} is no model that this ComfyUI knows: update ComfyUI, or use the bf16 file"
        )
    loaded.cached_patcher_init = (load_patcher, (path, dtype, weights, causal))
    loaded.set_attachments(BASE, base)
    return loaded


def load_model(path: Path, preset: str | None, dtype: str, weights: str) -> ModelPatcher:
    loaded = load_patcher(str(path), dtype, weights)
    loaded.set_attachments(PRESET, preset)
    on_cpu = management.is_device_cpu(loaded.load_device)  # there, every preview would take long
    if not on_cpu and (tiny := read_decoder(loaded.load_device)):
        preview_by(loaded, tiny)
    return loaded


def expected_dtype(info: CheckpointInfo, dtype: str) -> torch.dtype:
    """Ask ComfyUI's model management as its loader does."""
    supported = comfy.supported_models.WAN21_T2V.supported_inference_dtypes
    stored = getattr(torch, info.dtypes[0])
    count = info.nbytes // stored.itemsize
    held = DTYPES.get(dtype) or management.unet_dtype(
        model_params=count, supported_dtypes=supported, weight_dtype=stored
    )
    return management.unet_manual_cast(held, management.get_torch_device(), supported) or held


def load_demo(network: str) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    from ...refiner.bundles import BUNDLES, DEMO
    from ...refiner.demo.bundle import load_sprite_tiny
    from ...refiner.wan.checkpoint import load_vae_state
    from ..sprites import sprite_file, sprite_preset

    if network == "student":
        model = load_model(sprite_file("student"), sprite_preset(), "fp32", "auto")
    else:
        model = load_patcher(str(sprite_file(network)), "fp32", "auto", causal=False)
    demo = BUNDLES[DEMO]
    model.set_attachments(SIZE, demo.size)
    weights = {name: tensor.float() for name, tensor in load_vae_state(demo.vae).items()}
    preview_by(model, load_sprite_tiny(demo.vae.parent).to(model.load_device))
    model.model.latent_format.taesd_decoder_name = None  # such files decode Wan2.1's latents
    clip = sprite_clip(demo.text("cpu"))
    return model, clip, comfy.sd.VAE(sd=weights, dtype=torch.float32)


class SpriteText(nn.Module):
    """Adapter of the sprites' text encoder: the methods that comfy.sd.CLIP calls."""

    disable_offload = True  # half a megabyte of plain torch modules

    def __init__(self, encoder: nn.Module, **_: object) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict) -> None:
        """There are no options."""

    def reset_clip_options(self) -> None:
        """There are no options."""

    def encode_token_weights(self, tokens: dict[str, list[str]]) -> tuple[Tensor, None, dict]:
        """Encode to a context [1, text_len, text_dim], without a pooled output.

        Notices go along as an option of the CONDITIONING, for the sampler to show.
        """
        context = self.encoder(tokens["sprites"]).float()
        options = {NOTICES: [note for text in tokens["sprites"] for note in sprite_notes(text)]}
        return context.to(management.intermediate_device()), None, options


class SpriteTokenizer:
    """Pass the prompt on as text, which the encoder splits itself."""

    def __init__(self, **_: object) -> None:
        pass

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **_: object
    ) -> dict[str, list[str]]:
        if lines := sprite_notes(text):
            notice("; ".join(lines))
        return {"sprites": [text]}

    def state_dict(self) -> dict:
        return {}


def sprite_notes(text: str) -> list[str]:
    from ...refiner.bundles import BUNDLES, DEMO

    return BUNDLES[DEMO].prompt_notes(text)


def sprite_clip(encoder: nn.Module) -> comfy.sd.CLIP:

    class Target:
        params: dict = {}  # noqa: RUF012, ComfyUI copies it
        clip = partial(SpriteText, encoder)
        tokenizer = SpriteTokenizer

    count = sum(parameter.numel() for parameter in encoder.parameters())
    return comfy.sd.CLIP(Target, parameters=count)
