"""NodeHost in ComfyUI: its loaders, model management, attention, progress and folders."""

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
from ...refiner.wan.causal import CausalWan, Kernels
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

PRESET = "autorefiner.preset"  # attachment of a MODEL: its preset's name
BASE = "autorefiner.base"  # attachment of a MODEL: the fingerprint of its file
RESERVE = "autorefiner.kv"
# Keys that limit an entry of CONDITIONING to a part of the clip or the schedule.
LIMITS = ("area", "mask", "timestep_start", "timestep_end", "control", "gligen")
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
    return folder_paths.get_filename_list(folder)


def find_file(folder: str, name: str) -> Path:
    if name not in list_files(folder):
        raise ValueError(f"{name!r} is not in models/{folder}: put the file there and refresh")
    return Path(folder_paths.get_full_path_or_raise(folder, name))


def model_folder(folder: str) -> Path:
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
    from ...refiner.demo.bundle import recipe_of
    from ...refiner.wan.checkpoint import load_vae_state
    from ..sprites import sprite_file, sprite_preset

    if network == "student":
        model = load_model(sprite_file("student"), sprite_preset(), "fp32", "auto")
    else:
        model = load_patcher(str(sprite_file(network)), "fp32", "auto", causal=False)
    demo = BUNDLES[DEMO]
    weights = {name: tensor.float() for name, tensor in load_vae_state(demo.vae).items()}
    if preview := recipe_of("vae", demo.vae.parent).get("preview"):
        # The demo's VAE has other colours; this latent format belongs to this model alone.
        latents = model.model.latent_format
        *latents.latent_rgb_factors, latents.latent_rgb_factors_bias = preview
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

    def encode_token_weights(self, tokens: dict[str, list[str]]) -> tuple[Tensor, None]:
        """Encode to a context [1, text_len, text_dim], without a pooled output."""
        context = self.encoder(tokens["sprites"]).float()
        return context.to(management.intermediate_device()), None


class SpriteTokenizer:
    """Pass the prompt on as text, which the encoder splits itself."""

    def __init__(self, **_: object) -> None:
        pass

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **_: object
    ) -> dict[str, list[str]]:
        from ...refiner.bundles import BUNDLES, DEMO

        if lines := BUNDLES[DEMO].prompt_notes(text):
            notice("; ".join(lines))
        return {"sprites": [text]}

    def state_dict(self) -> dict:
        return {}


def sprite_clip(encoder: nn.Module) -> comfy.sd.CLIP:

    class Target:
        params: dict = {}  # noqa: RUF012, ComfyUI copies it
        clip = partial(SpriteText, encoder)
        tokenizer = SpriteTokenizer

    count = sum(parameter.numel() for parameter in encoder.parameters())
    return comfy.sd.CLIP(Target, parameters=count)


def network_of(model: ModelPatcher) -> nn.Module:
    """The Wan2.1 text-to-video module tree of a MODEL; ValueError for another model."""
    network = model.model.diffusion_model
    kind = type(model.model).__name__
    causal = isinstance(network, comfy.ldm.wan.model.WanModel) and network.in_dim == CHANNELS
    if not causal or network.model_type != "t2v" or hasattr(network, "vace_blocks"):
        raise ValueError(
            f"MODEL is a {kind} and not Wan2.1 text-to-video: use Load AR-VDM with an AR model's"
            " file"
        )
    return network


def facts(model: ModelPatcher) -> ModelFacts:
    network = network_of(model)
    config = WanConfig(**{name: getattr(network, name) for name in WanConfig.__dataclass_fields__})
    preset = model.get_attachment(PRESET)
    options = model.model_options.get("transformer_options", {})
    return ModelFacts(
        config,
        dtype=model.model.get_dtype_inference(),
        preset=preset if preset in PRESETS else None,
        device_bytes=int(management.get_total_memory(model.load_device)),
        start=options.get("ar_config", {}).get("initial_latent"),  # set by core's ARVideoI2V
    )


def own_network(model: ModelPatcher) -> CausalWan:
    return copied_network(model, network_of(model), facts(model).config)


def base_of(model: ModelPatcher) -> str | None:
    """The fingerprint taken at loading, or the live weights' for a MODEL of another loader."""
    return model.get_attachment(BASE) or comfy_layers.fingerprint_of_live(network_of(model))


def settled(model: ModelPatcher, run: Run) -> Run:
    """Merge where the layers are ComfyUI's own and a second copy fits beside the model."""
    if run.refined is None or run.refined.form == "branches":
        return run
    obstacle = comfy_layers.unmergeable(model, network_of(model))
    if obstacle and run.refined.form == "merged":
        notice(f"REFINER {run.refined.name} runs unmerged, which gives the same: {obstacle}")
    fits = held_bytes(run, facts(model)) < comfy_layers.room_beside(model)
    merge = not obstacle and (run.refined.form == "merged" or fits)
    return replace(run, refined=run.refined.chosen(merge))


def attend(
    transformer_options: dict,
    q_BNHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention by ComfyUI's backend, or by an override that the MODEL carries."""
    heads = q_BNHD.shape[2]
    flat = (x.flatten(2) for x in (q_BNHD, k_BTHD, v_BTHD))
    return optimized_attention(
        *flat, heads=heads, mask=bias, transformer_options=transformer_options
    )


def cast_like(parameter: Tensor, like: Tensor) -> Tensor:
    return management.cast_to(parameter, dtype=like.dtype, device=like.device)


def causal_network(model: ModelPatcher, transformer_options: dict) -> CausalWan:
    config = facts(model).config
    kernels = Kernels(
        attention=partial(attend, transformer_options),
        cast=cast_like,
        embed=lambda patches, x: patches(x.float()).to(x.dtype),  # ComfyUI keeps those in fp32
    )
    return CausalWan(network_of(model), config, kernels)


def prompt_of(guider: comfy.samplers.CFGGuider) -> Tensor:
    """The context [B, L, text_dim] of a guider's only prompt; ValueError for any other guidance."""
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        kind = type(guider).__name__
        raise ValueError(
            f"the guider is a {kind}, which mixes predictions: AR models take one prompt, use"
            " BasicGuider"
        )
    if guider.cfg != 1:
        raise ValueError(
            f"the guider has cfg {guider.cfg:g}: AR models are distilled, use BasicGuider or a cfg"
            " of 1"
        )
    positive = guider.conds.get("positive", [])
    if len(positive) != 1:
        raise ValueError(
            f"positive has {len(positive)} entries: the models take one prompt, so connect one"
        )
    limits = [name for name in LIMITS if positive[0].get(name) is not None]
    if limits:
        raise ValueError(
            f"positive has {' and '.join(limits)}: a prompt holds for all of a clip, connect it"
            " without"
        )
    context = positive[0].get("model_conds", {}).get("c_crossattn")
    if context is None:
        raise ValueError("positive holds no text: connect CLIP Text Encode")
    return context.cond


class PathwiseSampler(comfy.samplers.Sampler):
    """Run the core's loop inside a guider, which loads, patches and unloads the model.

    `make_run` plans the run of (facts, NOISE, SIGMAS, seed). `reserved` says that the model was
    loaded with room for the keys and values; else `sample` makes that room.
    """

    def __init__(
        self, make_run: Callable[[ModelFacts, Tensor, Tensor, int], Run], reserved: bool
    ) -> None:
        self.make_run = make_run
        self.reserved = reserved
        self.node, _ = page.this_run()  # the node on which the page shows the run

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
        disable_pbar=False,
    ) -> Tensor:  # fmt: skip
        """Sample normalised latents of the whole clip [B, C, F, h, w]."""
        if denoise_mask is not None:
            raise ValueError(
                "the latent has a noise mask, which AR models cannot follow: remove it"
            )
        model = guider.model_patcher
        known = facts(model)
        run = settled(model, self.make_run(known, noise, sigmas, extra_args.get("seed") or 0))
        if not self.reserved:
            make_room(model, held_bytes(run, known))
        options = extra_args["model_options"].get("transformer_options", {})
        network = causal_network(model, options)
        context = prompt_of(guider)
        with page.watching(run, self.node, pictures_of(model)) as watch:
            report = reporter(model, run, callback, watch)
            stop = watch.stopped if watch else None
            weights = comfy_layers.weights_on(model.load_device, known.dtype)
            clip = run.clip(
                network, context, model.load_device, known.dtype, report, stop, weights
            ).to(noise.device)
        if callback is not None:  # SamplerCustomAdvanced takes its denoised output from here
            total = Passes(run).total
            callback(total - 1, clip, clip, total)
        return clip


def make_room(model: ModelPatcher, nbytes: int) -> None:
    """Free device memory for a run: unload other models first, then a part of this one."""
    device = model.load_device
    if management.is_device_cpu(device):
        return
    loaded = [entry for entry in management.current_loaded_models if entry.model is model]
    management.free_memory(nbytes, device, keep_loaded=loaded)
    lacking = nbytes - management.get_free_memory(device)
    if lacking > 0:
        model.partially_unload(model.offload_device, lacking)


def pictures_of(model: ModelPatcher) -> Callable[[Tensor], Image]:
    """A function from a latent frame [1, C, 1, h, w] to a picture, by ComfyUI's linear map."""
    wan = model.model.latent_format
    return latent_preview.Latent2RGBPreviewer(
        wan.latent_rgb_factors, wan.latent_rgb_factors_bias, wan.latent_rgb_factors_reshape
    ).decode_latent_to_preview


def reporter(
    model: ModelPatcher, run: Run, callback: Callable | None, watch: page.Watch | None
) -> Callable[[Progress], None]:
    """A callback that shows each prediction's progress and newest frame, and raises interrupts."""
    passes = Passes(run)
    bar = comfy.utils.ProgressBar(passes.total) if callback is None else None
    previewer = None
    if bar is not None:
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

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
    """Clone the MODEL so that loading reserves memory for one chunk and for what the run holds."""
    model = model.clone()
    nbytes, chunk = held_bytes(run, facts(model)), run.plan.preset.chunk
    # In `joint` mode x0 and noise go through the network together.
    passes = 2 if run.refined and run.refined.cache.previous == "joint" else 1

    def prepare(executor, patcher, noise_shape, conds, *args, **options):
        batch, channels, frames, *size = noise_shape
        one = [batch, channels, passes * min(chunk, frames), *size]
        frame_bytes = patcher.model.memory_required([batch, channels, 1, *size])
        more = -(-nbytes // max(1, int(frame_bytes)))
        return executor(patcher, [*one[:2], one[2] + more, *size], conds, *args, **options)

    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, RESERVE, prepare)
    return model


def sample(model: ModelPatcher, positive: list, run: Run) -> Tensor:
    """Sample inside a guider; the latents are on ComfyUI's device for intermediate results."""
    guider = comfy.samplers.CFGGuider(reserving(model, run))
    guider.inner_set_conds({"positive": positive})
    empty = torch.zeros(run.shape)
    sampler = PathwiseSampler(lambda *_: run, reserved=True)
    try:
        clip = guider.sample(
            empty, empty, sampler, torch.tensor([1.0, 0.0]), seed=run.seed, disable_pbar=True
        )
    finally:
        management.soft_empty_cache()
    return clip.to(management.intermediate_device())


def make_sampler(options: SamplerOptions) -> PathwiseSampler:
    return PathwiseSampler(options.run, reserved=False)


def notice(text: str) -> None:
    logging.warning("AutoRefiner: %s", printable(text))
    show(text)
