"""Sampling in ComfyUI: a run inside a guider, with its memory, previews, progress and
interrupts."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from itertools import chain

import comfy.model_management as management
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...refiner.acceleration import Acceleration
from ...refiner.prompt_timeline import PlacedTimeline
from ...refiner.rollout import Progress
from ...refiner.schedule import Chunk
from ...refiner.timeline import Timeline
from ...refiner.wan.causal import CausalWan, Kernels
from ..accelerated import noting
from ..guided import SamplerOptions
from ..passes import Passes
from ..run import ModelFacts, Run, held_bytes, size_note
from ..run_states import NOTICES
from ..scenes import context_of, placed_scenes, scenes_text
from . import comfy_layers, page
from .comfy_held import continued, identity_of
from .comfy_live import recording
from .comfy_model import facts, network_of
from .comfy_previews import pictures_of, previews_wanted
from .page import notice

RESERVE = "autorefiner.kv"
# Keys that limit an entry of CONDITIONING to a part of the clip or the schedule.
LIMITS = ("area", "mask", "timestep_start", "timestep_end", "control", "gligen")


def settled(model: ModelPatcher, run: Run) -> Run:
    """Merge where the layers are ComfyUI's own and a second copy fits beside the model."""
    if run.refined is None or run.refined.form == "unmerged":
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
    exact = {} if bias is None else {"low_precision_attention": False}  # Sage would ignore a mask
    return optimized_attention(
        *flat, heads=heads, mask=bias, transformer_options=transformer_options, **exact
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


def check_guider(guider: comfy.samplers.CFGGuider) -> None:
    """Raise ValueError for a guider that would mix predictions."""
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


def prompt_of(positive: list[dict], placed: PlacedTimeline | None) -> Tensor | Timeline[Tensor]:
    """Return the context [B, L, text_dim] of a guider's prompt, or the timeline of its scenes."""
    limits = [name for name in LIMITS if any(each.get(name) is not None for each in positive)]
    if limits:
        raise ValueError(
            f"positive has {' and '.join(limits)}: a prompt holds for all of a clip, connect it"
            " without"
        )
    contexts = [each.get("model_conds", {}).get("c_crossattn") for each in positive]
    if None in contexts:
        raise ValueError("positive holds no text: connect CLIP Text Encode")
    return context_of([context.cond for context in contexts], placed)


class PathwiseSampler(comfy.samplers.Sampler):
    """Run the core's loop inside a guider, which loads, patches and unloads the model.

    `make_run` plans the run of (facts, NOISE, SIGMAS, seed). `reserved_for` is the MODEL that was
    loaded with room for the keys and values, by its identity; without it, `sample` makes that room.
    """

    def __init__(
        self,
        make_run: Callable[[ModelFacts, Tensor, Tensor, int], Run],
        reserved_for: Hashable = None,
        vae: comfy.sd.VAE | None = None,
    ) -> None:
        self.make_run = make_run
        self.vae = vae  # decodes the chunks for the page
        self.reserved_for = reserved_for
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
        check_guider(guider)
        positive = guider.conds.get("positive", [])
        for text in chain(*(each.get(NOTICES, ()) for each in positive)):
            notice(text)
        placed = placed_scenes(positive, run)
        context = prompt_of(positive, placed)
        if self.reserved_for is None:
            if note := size_note(run, known):
                notice(note)
            make_room(model, held_bytes(run, known))
            if placed:
                page.show(scenes_text(placed))
        run, hold = continued(run, context, self.reserved_for or identity_of(model))
        options = extra_args["model_options"].get("transformer_options", {})
        network = causal_network(model, options)
        memory = run.plan.memory(known.config, known.dtype)
        with (
            page.watching(run, self.node, pictures_of(model)) as watch,
            recording(self.vae, model, run, self.node) as recorder,  # may unload a part of MODEL
            noting(acceleration_for(model, known), memory, known.device, notice) as acceleration,
        ):
            report = reporter(model, run, callback, watch)
            stop = watch.stopped if watch else None
            receivers = [hold, watch and watch.finished, recorder and recorder.add]
            weights = comfy_layers.weights_on(model.load_device, known.dtype)
            prompts = placed.timeline if placed else None
            clip = run.clip(
                network,
                context,
                model.load_device,
                known.dtype,
                report,
                stop,
                weights,
                prompts,
                partial(finish, list(filter(None, receivers))),
                acceleration,
            ).to(noise.device)
        if callback is not None:  # SamplerCustomAdvanced takes its denoised output from here
            total = Passes(run).total
            callback(total - 1, clip, clip, total)
        return clip


def acceleration_for(model: ModelPatcher, known: ModelFacts) -> Acceleration:
    """Return the MODEL's acceleration; without graphs where its weights do not stay in place."""
    acceleration = known.acceleration
    streamed = model.is_dynamic() or model.model.model_lowvram
    if acceleration.replays(known.device) and streamed:
        notice("graphs do nothing while ComfyUI streams the model's weights to the device")
        return replace(acceleration, graphs="off")
    return acceleration


def finish(receivers: list[Callable[[Chunk, Tensor], None]], chunk: Chunk, x0: Tensor) -> None:
    """Pass a finished chunk on: to be held, and shown."""
    for receive in receivers:
        receive(chunk, x0)


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


def reporter(
    model: ModelPatcher, run: Run, callback: Callable | None, watch: page.Watch | None
) -> Callable[[Progress], None]:
    """Return a callback that shows progress and the newest frame, and raises interrupts."""
    passes = Passes(run)
    bar = comfy.utils.ProgressBar(passes.total) if callback is None else None
    previews = watch is not None and previews_wanted()

    def report(progress: Progress) -> None:
        management.throw_exception_if_processing_interrupted()
        passes.step(progress)
        newest, image = progress.x0[:, :, -1:], None
        if watch is not None:
            watch.picture.show(progress, passes.done_of_chunk == passes.needed)
            watch.step(progress, passes)
        if callback is not None:
            callback(passes.done - 1, newest, newest, passes.total)
            return
        if previews:
            image = ("JPEG", watch.picture(newest), latent_preview.MAX_PREVIEW_RESOLUTION)
        bar.update_absolute(passes.done, passes.total, image)

    return report


def reserving(model: ModelPatcher, run: Run) -> ModelPatcher:
    """Clone the MODEL so that loading reserves memory for one chunk and for what the run holds."""
    model = model.clone()
    known, chunk = facts(model), run.plan.preset.chunk
    nbytes = held_bytes(run, known)
    # In `joint` mode x0 and noise go through the network together.
    passes = 2 if run.refined and run.refined.cache.previous == "joint" else 1
    if run.plan.chunks:
        passes *= run.sampler().together(run.plan.levels)
    if not model.is_dynamic():
        memories = run.plan.memories(known.config, known.dtype, bool(run.refined), run.caches)
        passes *= known.acceleration.passes_held(memories, known.device)

    def prepare(executor, patcher, noise_shape, conds, *args, **options):
        batch, channels, frames, *size = noise_shape
        one = [batch, channels, passes * min(chunk, frames), *size]
        frame_bytes = patcher.model.memory_required([batch, channels, 1, *size])
        more = -(-nbytes // max(1, int(frame_bytes)))
        return executor(patcher, [*one[:2], one[2] + more, *size], conds, *args, **options)

    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, RESERVE, prepare)
    return model


def sample(
    model: ModelPatcher, positive: list, run: Run, vae: comfy.sd.VAE | None = None
) -> Tensor:
    """Sample inside a guider; the latents are on ComfyUI's device for intermediate results."""
    guider = comfy.samplers.CFGGuider(reserving(model, run))
    guider.inner_set_conds({"positive": positive})
    empty = torch.zeros(run.shape)
    sampler = PathwiseSampler(lambda *_: run, identity_of(model), vae)
    try:
        clip = guider.sample(
            empty, empty, sampler, torch.tensor([1.0, 0.0]), seed=run.seed, disable_pbar=True
        )
    finally:
        management.soft_empty_cache()
    return clip.to(management.intermediate_device())


def make_sampler(options: SamplerOptions) -> PathwiseSampler:
    return PathwiseSampler(options.run, vae=options.vae)
