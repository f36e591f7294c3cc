"""A request for a video, checked against its files and counted in bytes before any loading."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .bundles import refiner_file
from .choices import choose
from .device import pick_device, pick_dtype
from .estimate import Estimate, available_bytes, parameter_count, pass_bytes, text_kv_bytes
from .latents import format_lengths
from .memory.policies import POLICIES
from .noise.source import VERSION as NOISE_VERSION
from .outputs import differences, read_given
from .refiner_plan import RefinerPlan
from .request import GenerateOptions
from .run_plan import RunPlan
from .samplers import SAMPLERS, Method
from .schedule import Preset, get_preset, latent_frames
from .wan.checkpoint import Checkpoint, inspect, open_checkpoint, require_transformer
from .wan.transformer import WanConfig
from .wan.vae import WanVAE

PUBLISHED_VAE_DIM = 96


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request, with its memory estimate. Its files are open, and nothing is loaded
    yet."""

    options: GenerateOptions
    files: "OpenFiles"
    config: WanConfig
    preset: Preset
    preset_name: str
    preset_reason: str
    plan: RunPlan
    method: Method
    device: torch.device
    dtype: torch.dtype
    initial: Tensor | None
    estimate: Estimate
    refiner: RefinerPlan | None = None
    extended: dict[str, str] = field(default_factory=dict)  # metadata of the latents to extend

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the video and latents files."""
        options = self.options
        return {
            "prompt": options.prompt,
            "seed": str(options.seed),
            "preset": self.preset_name,
            "levels": ",".join(map(str, self.preset.levels)),
            "model": Path(options.model).name,
            "method": options.method,
            **({"policy": options.policy} if options.policy != "window" else {}),
            "frames": str(options.frames),
            "size": f"{options.width}x{options.height}",
            "window": f"{self.preset.window}, sink {self.preset.sink}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": options.weights,
            "noise": str(NOISE_VERSION),
            "chunk_lengths": format_lengths(self.plan.lengths),
            **(
                {"lora": ", ".join(lora.describe() for lora in options.lora)}
                if options.lora
                else {}
            ),
            **({"refiner": self.refiner.describe()} if self.refiner else {}),
        }


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """The model files of a run, each opened once; None for random weights, or where none is
    named."""

    model: Checkpoint | None
    vae: Checkpoint | None

    @classmethod
    def of(cls, options: GenerateOptions) -> "OpenFiles":
        """Open what a request names; ValueError where a file cannot be."""
        model, vae = options.model_source, options.vae_source
        return cls(
            open_checkpoint(model, weights=options.weights, lora=options.lora)
            if isinstance(model, Path)
            else None,
            open_checkpoint(vae) if isinstance(vae, Path) else None,
        )


def prepare(options: GenerateOptions) -> Job:
    """Check a request and estimate its memory, without loading weights.

    ValueError says what to change. A dry run may ask for more memory than is free.
    """
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    files = OpenFiles.of(options)
    config, name, reason = identify(options, files.model)
    preset = get_preset(name).changed(
        levels=options.levels, window=options.window, sink=options.sink
    )
    total = latent_frames(options.frames)
    shape = (config.in_dim, options.height // 8, options.width // 8)
    initial, extended = (None, {})
    if options.extend:
        initial, extended = read_given(options.extend, total, shape, preset.chunk)
    given = 0 if initial is None else initial.shape[2]
    method = choose(options.method, SAMPLERS, "method")
    policy = choose(options.policy, POLICIES, "policy")
    plan = RunPlan(preset, total - given, *shape[1:], given=given, policy=policy)
    refiner = plan_refiner(options, config, preset, dtype) if options.refiner else None
    method.check(preset, refiner.cache if refiner else None)
    estimate = estimate_memory(options, files, config, plan, method, dtype, refiner)
    if refiner and refiner.form == "auto":
        refiner = refiner.chosen(merge=estimate.total <= available_bytes(device))
        estimate = replace(estimate, refiner=refiner.nbytes)
    job = Job(
        options, files, config, preset, name, reason, plan, method, device, dtype, initial, estimate,
        refiner, extended,
    )  # fmt: skip
    if not options.dry_run:
        options.outputs.check(job.metadata)
        estimate.check(available_bytes(device))
    return job


def identify(options: GenerateOptions, checkpoint: Checkpoint | None) -> tuple[WanConfig, str, str]:
    """The model's sizes, the name of its preset, and how that is known."""
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
    """Read the refiner and check it against the model; not yet on a device."""
    path = refiner_file(options.refiner) or Path(options.refiner)
    return RefinerPlan.read(
        path, config, preset.all_levels, dtype, form=options.refiner_form,
        strength=options.refiner_strength, levels=options.refined_levels,
    )  # fmt: skip


def estimate_memory(
    options: GenerateOptions, files: OpenFiles, config: WanConfig, plan: RunPlan, method: Method,
    dtype: torch.dtype, refiner: RefinerPlan | None,
) -> Estimate:  # fmt: skip
    """Count the bytes of each part of a run."""
    chunk = plan.preset.chunk
    memory = plan.memory(config, dtype, refined=refiner is not None)
    caches = method.caches(plan.chunks[-1].levels) if plan.chunks else ()
    size = options.height, options.width
    vae_width = files.vae.vae_width() if files.vae else options.vae_source or PUBLISHED_VAE_DIM
    return Estimate(
        weights=parameter_count(config) * dtype.itemsize,
        refiner=refiner.nbytes if refiner else 0,
        kv=memory.nbytes * (1 + len(caches)),
        text_kv=text_kv_bytes(config, 1, config.text_len, dtype),
        activations=pass_bytes(config, memory, chunk),
        decode=WanVAE.decode_bytes(vae_width, *size, chunk, dtype),
        text_encoder=text_encoder_bytes(options),
    )


def text_encoder_bytes(options: GenerateOptions) -> int:
    """Bytes of the text encoder's weights in the dtype they run in (fp8 runs in bf16).

    0 with a context cache, which may hold the prompt.
    """
    if options.context or not options.text_encoder or options.context_cache:
        return 0
    info = inspect(options.text_encoder)
    return info.nbytes * (2 if info.dtypes[0].startswith("float8") else 1)


def notes(job: Job) -> list[str]:
    """What a user should know of the request before it runs, a line each."""
    options = job.options
    lines = [f"{name} does nothing in this run" for name in options.unused()]
    if options.extend and job.initial is None:
        lines.append(f"{options.extend} holds no finished chunk: the clip starts anew")
    others = job.extended and differences(job.extended, job.metadata, job.plan.given)
    if others:
        lines.append(
            f"{options.extend} was made with {others}: the clip goes on otherwise than it would"
            " have"
        )
    refined = job.refiner.levels if job.refiner else ()
    if note := job.method.note(job.preset.all_levels, refined):
        lines.append(note)
    return lines + options.notes_of_bundle()
