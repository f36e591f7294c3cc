"""The nodes' surroundings in ComfyUI: its loaders, model management, attention, progress, previews and folders."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import comfy.latent_formats
import comfy.ldm.wan.model
import comfy.model_management as management
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io
from PIL.Image import Image
from torch import Tensor, nn

from ...refiner.noise.file import fingerprint_of
from ...refiner.rollout import Progress
from ...refiner.schedule import PRESETS
from ...refiner.terminal import printable
from ...refiner.wan.causal import CausalWan, Host
from ...refiner.wan.checkpoint import CheckpointInfo
from ...refiner.wan.transformer import WanConfig
from ..guided import SamplerOptions
from ..passes import Passes
from ..run import CHANNELS, ModelFacts, Run, held_bytes
from . import comfy_layers, page
from .comfy_training import (  # noqa: F401, of NodeHost
    copied_network,
    encode_prompt,
    find_folder,
    list_folders,
    output_folder,
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
    graph_metadata,
    output_path,
    show_pair,
    show_video,
    vae_width,
    video_file,
)
from .page import show as show
from .page import stops as stops

PRESET = "autorefiner.preset"  # the attachment of a MODEL that names how it is sampled
BASE = "autorefiner.base"  # and of the fingerprint of its file, by which a refiner knows its base
RESERVE = "autorefiner.kv"
LIMITS = ("area", "mask", "timestep_start", "timestep_end", "control", "gligen")  # of an entry of CONDITIONING
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

    class AutoRefiner(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return list(nodes)

    return AutoRefiner()


def list_files(folder: str) -> list[str]:
    """Names of the files in one of ComfyUI's model folders."""
    return folder_paths.get_filename_list(folder)


def find_file(folder: str, name: str) -> Path:
    """A file by the name that `list_files` gives it; ValueError for any other."""
    if name not in list_files(folder):
        raise ValueError(f"{name!r} is not in models/{folder}: put the file there and refresh")
    return Path(folder_paths.get_full_path_or_raise(folder, name))


def model_folder(folder: str) -> Path:
    """Where new files of a kind are written."""
    return Path(folder_paths.get_folder_paths(folder)[0])


def load_patcher(
    path: str, dtype: str, weights: str, causal: bool = True, disable_dynamic: bool = False
) -> ModelPatcher:
    """A Wan2.1 ModelPatcher of a published file; ComfyUI may call this again for an untouched copy."""
    from ...refiner.wan.checkpoint import read_transformer

    state, info = read_transformer(path, weights=weights)
    sizes = asdict(info.config) | ({"causal_ar": True} if causal else {})  # ComfyUI knows no false one
    metadata = {**info.metadata, "config": json.dumps({"transformer": sizes})}
    options = {"dtype": DTYPES[dtype]} if dtype in DTYPES else {}
    base = fingerprint_of(state)  # before ComfyUI takes the weights, maybe to narrower ones
    loaded = comfy.sd.load_diffusion_model_state_dict(
        state, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if loaded is None:
        raise ValueError(f"{path} is no model that this ComfyUI knows: update ComfyUI, or use the bf16 file")
    loaded.cached_patcher_init = (load_patcher, (path, dtype, weights, causal))
    loaded.set_attachments(BASE, base)
    return loaded


def load_model(path: Path, preset: str | None, dtype: str, weights: str) -> ModelPatcher:
    """A MODEL of a file with its preset attached."""
    loaded = load_patcher(str(path), dtype, weights)
    loaded.set_attachments(PRESET, preset)
    return loaded


def expected_dtype(info: CheckpointInfo, dtype: str) -> torch.dtype:
    """What a model of this file will compute in, as ComfyUI chooses when it loads it."""
    supported = comfy.supported_models.WAN21_T2V.supported_inference_dtypes
    stored = getattr(torch, info.dtypes[0])
    count = info.nbytes // stored.itemsize
    kept = DTYPES.get(dtype) or management.unet_dtype(
        model_params=count, supported_dtypes=supported, weight_dtype=stored
    )
    return management.unet_manual_cast(kept, management.get_torch_device(), supported) or kept


def load_demo(network: str) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """The bundle with its student or teacher, as ComfyUI's own nodes take it."""
    from ...refiner.demo import bundle
    from ...refiner.wan.checkpoint import load_vae_state
    from ..sprites import sprite_file, sprite_preset

    if network == "student":
        model = load_model(sprite_file("student"), sprite_preset(), "fp32", "auto")
    else:
        model = load_patcher(str(sprite_file(network)), "fp32", "auto", causal=False)
    weights = {name: tensor.float() for name, tensor in load_vae_state(sprite_file("vae")).items()}
    if preview := bundle.told_of("vae", bundle.WEIGHTS).get("preview"):
        latents = model.model.latent_format  # this model's own: its previews are in the colours of the demo's VAE
        *latents.latent_rgb_factors, latents.latent_rgb_factors_bias = preview
    return model, sprite_clip(bundle.load_sprite_text(bundle.WEIGHTS)), comfy.sd.VAE(sd=weights, dtype=torch.float32)


class SpriteText(nn.Module):
    """The sprites' text encoder with the methods that comfy.sd.CLIP calls."""

    disable_offload = True  # half a megabyte of plain torch modules

    def __init__(self, encoder: nn.Module, **_: object) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict) -> None:
        """None that it has."""

    def reset_clip_options(self) -> None:
        """None that it has."""

    def encode_token_weights(self, tokens: dict[str, list[str]]) -> tuple[Tensor, None]:
        """(context [1, text_len, text_dim], no pooled output)."""
        return self.encoder(tokens["sprites"]).float().to(management.intermediate_device()), None


class SpriteTokenizer:
    """Hands the prompt on: the encoder knows its words."""

    def __init__(self, **_: object) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: object) -> dict[str, list[str]]:
        from ...refiner.demo.captions import misread

        if told := misread(text):
            notice("; ".join(told))
        return {"sprites": [text]}

    def state_dict(self) -> dict:
        return {}


def sprite_clip(encoder: nn.Module) -> comfy.sd.CLIP:
    """A CLIP of the sprites' text encoder."""

    class Target:
        params: dict = {}  # noqa: RUF012, ComfyUI copies it
        clip = partial(SpriteText, encoder)
        tokenizer = SpriteTokenizer

    return comfy.sd.CLIP(Target, parameters=sum(parameter.numel() for parameter in encoder.parameters()))


def network_of(model: ModelPatcher) -> nn.Module:
    """The Wan2.1 text-to-video module tree of a MODEL; ValueError for another model."""
    network = model.model.diffusion_model
    kind = type(model.model).__name__
    causal = isinstance(network, comfy.ldm.wan.model.WanModel) and network.in_dim == CHANNELS
    if not causal or network.model_type != "t2v" or hasattr(network, "vace_blocks"):
        raise ValueError(f"MODEL is a {kind} and not Wan2.1 text-to-video: use Load AR-VDM with an AR model's file")
    return network


def facts(model: ModelPatcher) -> ModelFacts:
    """What a MODEL is; ValueError for one that is no Wan2.1 text-to-video."""
    network = network_of(model)
    config = WanConfig(**{name: getattr(network, name) for name in WanConfig.__dataclass_fields__})
    preset = model.get_attachment(PRESET)
    memory = int(management.get_total_memory(model.load_device))
    options = model.model_options.get("transformer_options", {})
    start = options.get("ar_config", {}).get("initial_latent")  # of core's ARVideoI2V
    return ModelFacts(config, model.model.get_dtype_inference(), preset if preset in PRESETS else None, memory, start)


def own_network(model: ModelPatcher) -> CausalWan:
    """A frozen copy of a MODEL's network, to train with."""
    return copied_network(model, network_of(model), facts(model).config)


def base_of(model: ModelPatcher) -> str | None:
    """The fingerprint of a MODEL's own weights, by which a refiner knows its base; None where they do not tell."""
    return model.get_attachment(BASE) or comfy_layers.fingerprint_of_live(network_of(model))


def settled(model: ModelPatcher, run: Run) -> Run:
    """The run with its refiner merged or in branches: merged where the layers are ComfyUI's and there is memory."""
    if run.refined is None or run.refined.form == "branches":
        return run
    odd = comfy_layers.unmergeable(model, network_of(model))
    if odd and run.refined.form == "merged":
        notice(f"REFINER {run.refined.name} runs unmerged, which gives the same: {odd}")
    room = comfy_layers.room_beside(model)
    merge = not odd and (run.refined.form == "merged" or held_bytes(run, facts(model)) < room)
    return replace(run, refined=run.refined.chosen(merge))


def attend(transformer_options: dict, heads: int, q_BNHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
    """Attention by whatever ComfyUI, or an override on the MODEL, computes it with."""
    flat = (x.flatten(2) for x in (q_BNHD, k_BTHD, v_BTHD))
    return optimized_attention(*flat, heads=heads, transformer_options=transformer_options)


def causal_network(model: ModelPatcher, transformer_options: dict) -> CausalWan:
    """The causal forward over the loaded modules."""
    config = facts(model).config
    host = Host(
        attention=partial(attend, transformer_options, config.num_heads),
        cast=lambda parameter, like: management.cast_to(parameter, dtype=like.dtype, device=like.device),
        embed=lambda patches, x: patches(x.float()).to(x.dtype),  # those weights stay in fp32
    )
    return CausalWan(network_of(model), config, host)


def prompt_of(guider: comfy.samplers.CFGGuider) -> Tensor:
    """The context [B, L, text_dim] of a guider's one prompt; ValueError when it does more than that."""
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        kind = type(guider).__name__
        raise ValueError(f"the guider is a {kind}, which mixes predictions: AR models take one prompt, use BasicGuider")
    if guider.cfg != 1:
        raise ValueError(f"the guider has cfg {guider.cfg:g}: AR models are distilled, use BasicGuider or a cfg of 1")
    positive = guider.conds.get("positive", [])
    if len(positive) != 1:
        raise ValueError(f"positive has {len(positive)} entries: the models take one prompt, so connect one")
    limits = [name for name in LIMITS if positive[0].get(name) is not None]
    if limits:
        raise ValueError(f"positive has {' and '.join(limits)}: a prompt holds for all of a clip, connect it without")
    context = positive[0].get("model_conds", {}).get("c_crossattn")
    if context is None:
        raise ValueError("positive holds no text: connect CLIP Text Encode")
    return context.cond


class PathwiseSampler(comfy.samplers.Sampler):
    """Runs the core's loop inside a guider, which loads and patches the model, prepares the prompt and cleans up."""

    def __init__(self, make_run: Callable[[ModelFacts, Tensor, Tensor, int], Run], reserved: bool) -> None:
        self.make_run = make_run  # of the model's facts, NOISE, SIGMAS and the seed
        self.reserved = reserved  # whether the memory that was asked for at loading holds the K/V
        self.node, _ = page.this_run()  # where the page shows the run

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        """Normalised latents of the whole clip [B, C, F, h, w]."""
        if denoise_mask is not None:
            raise ValueError("the latent has a noise mask, which AR models cannot follow: remove it")
        model = guider.model_patcher
        told = facts(model)
        run = settled(model, self.make_run(told, noise, sigmas, extra_args.get("seed") or 0))
        if not self.reserved:
            make_room(model, held_bytes(run, told))
        network = causal_network(model, extra_args["model_options"].get("transformer_options", {}))
        context = prompt_of(guider)
        with page.watching(run, self.node, pictures_of(model)) as watch:
            report = reporter(model, run, callback, watch)
            stop = watch.stopped if watch else None
            weights = comfy_layers.weights_on(model.load_device, told.dtype)
            clip = run.clip(network, context, model.load_device, told.dtype, report, stop, weights).to(noise.device)
        if callback is not None:  # what SamplerCustomAdvanced calls its denoised output
            total = Passes(run).total
            callback(total - 1, clip, clip, total)
        return clip


def make_room(model: ModelPatcher, nbytes: int) -> None:
    """Free memory on the device for what a run holds: other models go first, then a part of this one."""
    device = model.load_device
    if management.is_device_cpu(device):
        return
    own = [loaded for loaded in management.current_loaded_models if loaded.model is model]
    management.free_memory(nbytes, device, keep_loaded=own)
    lacking = nbytes - management.get_free_memory(device)
    if lacking > 0:
        model.partially_unload(model.offload_device, lacking)


def pictures_of(model: ModelPatcher) -> Callable[[Tensor], Image]:
    """A picture of a latent frame [1, C, 1, h, w] by a linear map of its channels, which needs no VAE."""
    wan = model.model.latent_format
    return latent_preview.Latent2RGBPreviewer(
        wan.latent_rgb_factors, wan.latent_rgb_factors_bias, wan.latent_rgb_factors_reshape
    ).decode_latent_to_preview


def reporter(
    model: ModelPatcher, run: Run, callback: Callable | None, watch: page.Watch | None
) -> Callable[[Progress], None]:
    """Progress of every prediction, with a preview of the newest frame; interrupts end the run here."""
    passes = Passes(run)
    bar = comfy.utils.ProgressBar(passes.total) if callback is None else None
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format) if bar else None

    def report(progress: Progress) -> None:
        management.throw_exception_if_processing_interrupted()
        passes.step(progress)
        if watch is not None:
            watch.step(progress, passes)
        newest = progress.x0[:, :, -1:]
        if callback is not None:
            callback(passes.done - 1, newest, newest, passes.total)
            return
        image = previewer.decode_latent_to_preview_image("JPEG", newest) if previewer else None
        bar.update_absolute(passes.done, passes.total, image)

    return report


def reserving(model: ModelPatcher, run: Run) -> ModelPatcher:
    """A clone of the MODEL that asks for the memory of one chunk and of what the run holds when it is loaded."""
    model = model.clone()
    nbytes, chunk = held_bytes(run, facts(model)), run.plan.preset.chunk
    passes = 2 if run.refined and run.refined.cache.previous == "joint" else 1  # x0 and noise go through it together

    def prepare(executor, patcher, noise_shape, conds, *args, **options):
        batch, channels, frames, *size = noise_shape
        one = [batch, channels, passes * min(chunk, frames), *size]
        area = patcher.model.memory_required([batch, channels, 1, *size])  # bytes of a frame; they grow with the area
        more = -(-nbytes // max(1, int(area)))
        return executor(patcher, [*one[:2], one[2] + more, *size], conds, *args, **options)

    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, RESERVE, prepare)
    return model


def sample(model: ModelPatcher, positive: list, run: Run) -> Tensor:
    """The raw latents [B, C, F, h, w] of a run, on ComfyUI's device for such."""
    guider = comfy.samplers.CFGGuider(reserving(model, run))
    guider.inner_set_conds({"positive": positive})
    empty = torch.zeros(run.shape)
    sampler = PathwiseSampler(lambda *_: run, reserved=True)
    try:
        clip = guider.sample(empty, empty, sampler, torch.tensor([1.0, 0.0]), seed=run.seed, disable_pbar=True)
    finally:
        management.soft_empty_cache()
    return clip.to(management.intermediate_device())


def make_sampler(options: SamplerOptions) -> PathwiseSampler:
    """A SAMPLER."""
    return PathwiseSampler(options.run, reserved=False)


def notice(text: str) -> None:
    """Something to know that is no error: in the log, and on the node."""
    logging.warning("AutoRefiner: %s", printable(text))
    show(text)
