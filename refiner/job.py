"""Check a request for a video against its files, and estimate its memory, before any loading."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .acceleration import Acceleration
from .bundles import refiner_file
from .choices import choose
from .device import pick_device, pick_dtype
from .estimate import Estimate, available_bytes, pass_bytes, text_kv_bytes, weight_bytes
from .latents import format_lengths
from .memory.policies import POLICIES
from .memory.policy import Policy
from .memory.stores import DEFAULT_STORE, get_store
from .noise.source import VERSION as NOISE_VERSION
from .noise.source import NoiseSource, WhiteNoise
from .noise.sources import NOISES
from .outputs import differences, read_given
from .prompt_timeline import (
    PlacedTimeline,
    extended_timeline,
    parse_timeline,
    place_sections,
    steered_sections,
    with_default,
)
from .recipe import parse_recipe
from .refiner_plan import RefinerPlan
from .request import GenerateOptions
from .run_plan import RunPlan, for_length, suggested
from .sample import check_switches
from .samplers import Method
from .schedule import Preset, first_pixel_frame, get_preset, latent_frames
from .verifiers import SearchPlan, choose_method
from .wan.checkpoint import Checkpoint, inspect, open_checkpoint, require_transformer
from .wan.fp8_linear import check_fp8, multiplies_fp8
from .wan.transformer import WanConfig
from .wan.vae import WanVAE

PUBLISHED_VAE_DIM = 96


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request with its memory estimate. Its files are open, no weights are loaded."""

    options: GenerateOptions
    files: "OpenFiles"
    config: WanConfig
    preset: Preset
    preset_name: str
    preset_reason: str
    plan: RunPlan
    method: Method
    noise: NoiseSource
    device: torch.device
    dtype: torch.dtype
    initial: Tensor | None
    estimate: Estimate
    refiner: RefinerPlan | None = None
    search: SearchPlan | None = None  # of a method that chooses by a reward
    extended: dict[str, str] = field(default_factory=dict)  # metadata of the latents to extend
    timeline: PlacedTimeline | None = None  # None: the prompt or context alone
    length: int | None = None  # latent frames before the recipe; None without an end
    acceleration: Acceleration = field(default_factory=Acceleration)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of all scenes in order."""
        if self.timeline is None:
            return (self.options.prompt,)
        return tuple(scene.prompt for scene in self.timeline.timeline.scenes)

    @property
    def memory(self) -> str:
        """The memory policy, with its knobs."""
        return self.options.memory or self.preset.memory

    @property
    def decodes_beside(self) -> bool:
        """Whether chunks are decoded while others are sampled."""
        return self.estimate.beside

    @property
    def store(self) -> str:
        """The name of the store."""
        return self.options.store or DEFAULT_STORE

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the video and latents files; `prompt` is the last one of a timeline."""
        options = self.options
        metadata = {
            "prompt": self.prompts[-1],
            "seed": str(options.seed),
            "preset": self.preset_name,
            "levels": ",".join(map(str, self.preset.levels)),
            "model": Path(options.model).name,
            "method": options.sampler,
            "frames": "endless" if options.frames is None else str(options.frames),
            "size": f"{options.width}x{options.height}",
            "window": f"{self.preset.window}, sink {self.preset.sink}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": options.weights,
            "noise": noise_version(options.noise),
            "chunk_lengths": format_lengths(self.plan.lengths, self.plan.endless),
        }
        if len(self.prompts) > 1:
            metadata["timeline"] = self.timeline.text
        if self.memory != "window":
            metadata["memory"] = self.memory
        if options.positions:
            metadata["positions"] = options.positions
        if options.recipe:
            metadata["recipe"] = str(parse_recipe(options.recipe))
        if not self.plan.store.exact:
            metadata["store"] = self.store
        if options.fp8:
            metadata["products"] = "fp8"
        if options.lora:
            metadata["lora"] = ", ".join(lora.describe() for lora in options.lora)
        if self.search:
            metadata["reward"] = self.search.describe()
        if self.refiner:
            metadata["refiner"] = self.refiner.describe()
        return metadata


def noise_version(noise: str) -> str:
    """Describe a noise in metadata: the version of the white noise that it is made of, its name."""
    return str(NOISE_VERSION) if noise == "white" else f"{NOISE_VERSION}, {noise}"


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """The model files of a run, each opened once; None for random weights and for no file."""

    model: Checkpoint | None
    vae: Checkpoint | None

    @classmethod
    def of(cls, options: GenerateOptions) -> "OpenFiles":
        """Open the files that a request names; ValueError for one that cannot be read."""
        model, vae = None, None
        if isinstance(options.model_source, Path):
            weights, lora = options.weights, options.lora
            model = open_checkpoint(options.model_source, weights=weights, lora=lora)
        if isinstance(options.vae_source, Path):
            vae = open_checkpoint(options.vae_source)
        return cls(model, vae)


def prepare(options: GenerateOptions) -> Job:
    """Check a request and estimate its memory, without loading weights.

    Raises ValueError, which says what to change. A dry run may ask for more memory than is free.
    """
    return checked(plan_job(options))


def checked(job: Job) -> Job:
    """Return the job; ValueError if it would lose another run's files or exceed free memory."""
    if not job.options.dry_run:
        job.options.outputs.check(job.metadata)
        job.estimate.check(available_bytes(job.device))
    return job


def plan_job(options: GenerateOptions) -> Job:
    """Plan a request and estimate its memory; ValueError for options that do not go together."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    if options.fp8:
        check_fp8(device)
    files = OpenFiles.of(options)
    config, name, reason = identify(options, files.model)
    total = None if options.frames is None else latent_frames(options.frames)
    method, search = choose_method(options.sampler), SearchPlan.of(options)
    shape = (config.in_dim, options.height // 8, options.width // 8)
    initial, extended = (None, {})
    if options.extend:
        chunk = get_preset(name).chunk
        initial, extended = read_given(options.extend, total, shape, chunk)
    preset, policy = choose_memory(options, name, method, total, extended)
    given = 0 if initial is None else initial.shape[2]
    new = None if total is None else total - given
    store = get_store(options.store or DEFAULT_STORE)
    plan = RunPlan(preset, new, *shape[1:], given=given, policy=policy, store=store)
    recipe, length = parse_recipe(options.recipe), total
    if recipe.commands:
        total = recipe.frames(plan)
        options = replace(options, frames=first_pixel_frame(total))
        plan = replace(plan, frames=total - given)
    shaped = choose(options.noise, NOISES, "noise")
    timeline = plan_timeline(options, plan, extended, length)
    if timeline:
        check_switches(timeline.timeline, plan, method)
    refiner = plan_refiner(options, config, preset, dtype) if options.refiner else None
    method.check(preset, refiner.cache if refiner else None)
    estimate = estimate_memory(options, files, config, plan, method, dtype, refiner, search, device)
    refiner, estimate = settle_form(refiner, estimate, device)
    return Job(
        options=options,
        files=files,
        config=config,
        preset=preset,
        preset_name=name,
        preset_reason=reason,
        plan=plan,
        method=method,
        noise=shaped(recipe.noise(WhiteNoise(options.seed)), preset.chunk),
        device=device,
        dtype=dtype,
        initial=initial,
        estimate=estimate,
        refiner=refiner,
        search=search,
        extended=extended,
        timeline=timeline,
        length=length,
        acceleration=options.acceleration,
    )


def replan(job: Job, options: GenerateOptions) -> Job:
    """Plan a job again with other options of its memory: window, sink, store and refiner form.

    The window must leave room for the chunks that the method predicts together.
    """
    preset = job.preset.changed(window=options.window, sink=options.sink)
    plan = replace(job.plan, preset=preset, store=get_store(options.store or DEFAULT_STORE))
    refiner = replace(job.refiner, form=options.refiner_form) if job.refiner else None
    kv, kv_host, activations = count_memory(
        options, job.config, plan, job.method, job.dtype, refiner is not None, job.device
    )
    estimate = replace(
        job.estimate,
        refiner=refiner.nbytes if refiner else 0,
        kv=kv,
        kv_host=kv_host,
        activations=activations,
    )
    refiner, estimate = settle_form(refiner, estimate, job.device)
    return replace(
        job,
        options=options,
        preset=preset,
        plan=plan,
        estimate=estimate,
        refiner=refiner,
        timeline=plan_timeline(options, plan, job.extended, job.length),
    )


def choose_memory(
    options: GenerateOptions,
    preset_name: str,
    method: Method,
    total: int | None,
    extended: Mapping[str, str],
) -> tuple[Preset, Policy]:
    """Return the preset as the request changes it, and the memory policy.

    A long clip of one prompt gets the preset's memory for such, and so does its continuation. The
    sink of that memory would hold the old scene in sight, so another prompt does not get it.
    """
    preset = get_preset(preset_name)
    one_by_one = method.together(preset.chunk_levels()) == 1
    goes_on = not options.extend or (
        extended.get("memory") == preset.long_memory
        and options.prompt in ("", extended.get("prompt"))
    )
    if options.leaves_memory and one_by_one and goes_on:
        preset = for_length(preset, total)
    policy = choose(options.memory or preset.memory, POLICIES, "memory")
    changed = suggested(preset, policy).changed(
        levels=options.levels,
        window=options.window,
        sink=options.sink,
        positions=options.positions,
    )
    return changed, policy


def plan_timeline(
    options: GenerateOptions,
    plan: RunPlan,
    extended: Mapping[str, str],
    length: int | None,
) -> PlacedTimeline | None:
    """Place the request's timeline on the run, or the new prompt of an extended clip.

    `length` are the run's latent frames before its recipe.
    """
    if options.timeline:
        sections = parse_timeline(options.timeline)
        if options.transition:
            sections = with_default(sections, options.transition)
        recipe = parse_recipe(options.recipe)
        if recipe.commands:
            sections = steered_sections(sections, plan, length, recipe.ends)
        return place_sections(sections, plan)
    if options.context or not extended:
        return None
    return extended_timeline(extended, options.prompt, options.transition, plan)


def identify(options: GenerateOptions, checkpoint: Checkpoint | None) -> tuple[WanConfig, str, str]:
    """Return the model's sizes, its preset's name, and the reason for that preset."""
    if checkpoint is None:
        return options.model_source, options.preset or options.bundle.preset, "untrained"
    info = checkpoint.info
    config = require_transformer(info)
    if options.preset:
        return config, options.preset, "as asked for"
    if info.preset:
        return config, info.preset, info.preset_reason
    raise ValueError(f"{options.model}: {info.preset_reason} (`autorefiner presets` lists them)")


def plan_refiner(
    options: GenerateOptions, config: WanConfig, preset: Preset, dtype: torch.dtype
) -> RefinerPlan:
    """Read the refiner and check it against the model; its tensors are not on a device yet."""
    return RefinerPlan.read(
        refiner_file(options.refiner) or Path(options.refiner),
        config,
        preset.all_levels,
        dtype,
        form=options.refiner_form,
        strength=options.refiner_strength,
        levels=options.refined_levels,
        fp8=options.fp8,
    )


def settle_form(
    refiner: RefinerPlan | None, estimate: Estimate, device: torch.device
) -> tuple[RefinerPlan | None, Estimate]:
    """Merge a refiner whose form is `auto` if that fits into free memory."""
    if refiner is None or refiner.form != "auto":
        return refiner, estimate
    refiner = refiner.chosen(merge=estimate.total <= available_bytes(device))
    return refiner, replace(estimate, refiner=refiner.nbytes)


def count_memory(
    options: GenerateOptions,
    config: WanConfig,
    plan: RunPlan,
    method: Method,
    dtype: torch.dtype,
    refined: bool,
    device: torch.device,
) -> tuple[int, int, int]:
    """Count bytes of K/V on the device, of K/V on the host besides, and of a pass's activations."""
    levels = plan.levels
    caches = method.caches(levels) if levels else ()
    memories = plan.memories(config, dtype, refined, caches)
    on_device, on_host = zip(*(each.bytes_on(device) for each in memories), strict=True)
    together = min(plan.preset.chunk * method.together(levels), memories[0].window_frames)
    passes = options.acceleration.passes_held(memories, device)
    activations = passes * pass_bytes(config, memories[0], together, options.fp8)
    return sum(on_device), sum(on_host), activations


def estimate_memory(
    options: GenerateOptions,
    files: OpenFiles,
    config: WanConfig,
    plan: RunPlan,
    method: Method,
    dtype: torch.dtype,
    refiner: RefinerPlan | None,
    search: SearchPlan | None,
    device: torch.device,
) -> Estimate:
    """Estimate the bytes of a run by use."""
    refined = refiner is not None
    kv, kv_host, activations = count_memory(options, config, plan, method, dtype, refined, device)
    size = options.height, options.width
    vae_width = files.vae.vae_width() if files.vae else options.vae_source or PUBLISHED_VAE_DIM
    return Estimate(
        weights=weight_bytes(config, dtype, options.fp8),
        refiner=refiner.nbytes if refiner else 0,
        kv=kv,
        kv_host=kv_host,
        text_kv=text_kv_bytes(config, 1, config.text_len, dtype),
        activations=activations,
        decode=WanVAE.decode_bytes(vae_width, *size, plan.preset.chunk, dtype),
        search=search.nbytes(plan, vae_width, dtype) if search else 0,
        text_encoder=text_encoder_bytes(options),
        unconverted=weight_bytes(config, dtype) if options.fp8 and device.type == "cpu" else 0,
        beside=device.type == "cuda",
    )


def text_encoder_bytes(options: GenerateOptions) -> int:
    """Return the bytes of the text encoder's weights in the dtype they run in (bf16 for fp8).

    0 with a context cache, which may already hold the prompt.
    """
    if options.context or not options.text_encoder or options.context_cache:
        return 0
    info = inspect(options.text_encoder)
    return info.nbytes * (2 if info.dtypes[0].startswith("float8") else 1)


def notes(job: Job) -> list[str]:
    """List what a user should know of the request before it runs, one line each."""
    options = job.options
    lines = [f"{name} does nothing in this run" for name in options.unused()]
    if options.extend and job.initial is None:
        lines.append(f"{options.extend} holds no finished chunk: the clip starts anew")
    others = job.extended and differences(job.extended, job.metadata, job.plan.given)
    if others:
        lines.append(
            f"{options.extend} was made with {others}: the clip will continue differently than in"
            " that run"
        )
    if options.store == "offload" and job.device.type == "cpu":
        lines.append("--store offload saves nothing on a CPU: the device's memory is the host's")
    memory = job.plan.memory(job.config, job.dtype) if job.plan.chunks else None
    if memory is not None:
        lines += job.acceleration.notes(memory, job.device)
    if options.fp8 and not multiplies_fp8(job.device):
        lines.append(
            f"--fp8 saves memory and is slower here: {job.device} does not multiply fp8 (CUDA"
            " compute capability 8.9 does)"
        )
    if options.positions == "sink-adjacent" and not job.preset.sink:
        lines.append("--positions sink-adjacent does nothing without --window and --sink")
    if job.initial is not None and not job.method.goes_on:
        lines.append(
            f"{job.method.name} begins later chunks before a chunk is finished: the clip will"
            " continue differently than in a run that was not interrupted"
        )
    refined = job.refiner.levels if job.refiner else ()
    if note := job.method.note(job.preset.all_levels, refined):
        lines.append(note)
    if job.timeline and job.timeline.timeline.recached and job.preset.recache < 0:
        lines.append(
            "this model is not known to be trained for a recache: if the old picture stays, take"
            " --transition 'flush 1'"
        )
    return lines + options.notes_of_bundle(job.prompts)
