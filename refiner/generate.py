"""From a prompt to a video file: everything between the command line and the sampler."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from .choices import choose
from .demo.bundle import FILES, REFINERS, WEIGHTS, load_sprite_text, sprite_refiner_file
from .demo.captions import misread
from .estimate import Estimate, available_bytes, parameter_count, pass_bytes, text_kv_bytes
from .latents import LatentWriter, format_lengths
from .memory.policies import POLICIES
from .noise.source import VERSION as NOISE_VERSION
from .outputs import Outputs, differences, read_given
from .pictures import contact_sheet
from .refined import Form, RefinerPlan
from .rollout import Progress
from .sample import RunPlan, finite, sample
from .samplers import SAMPLERS, Method
from .schedule import Preset, get_preset, latent_frames
from .video import VideoWriter, read_frames, to_frames
from .wan.causal import CausalWan
from .wan.checkpoint import inspect, load_transformer, load_vae_state, require_transformer
from .wan.lora import LoraFile
from .wan.text import load_text_encoder
from .wan.transformer import WAN_TINY, WanConfig, WanTransformer
from .wan.vae import DecoderState, WanVAE
from .wan.weight_file import open_weights

RANDOM_TINY = "random-tiny"
SPRITES = "sprites"  # the bundled demo
SPRITES_SIZE = (64, 64)
RANDOM_VAE_DIM = 8
FPS = 16
SHEET_FRAMES = 24


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What a user asks for; see the help of `autorefiner generate`. Sizes are in pixels, frames in pixel frames."""

    model: str
    out: Path
    prompt: str = ""
    preset: str | None = None
    steps: tuple[int, ...] | None = None  # None here and in the next two: the preset's
    window: int | None = None
    sink: int | None = None
    weights: str = "auto"
    lora: tuple[LoraFile, ...] = ()
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    context_cache: Path | None = None
    context: Path | None = None
    vae: Path | None = None
    frames: int = 81
    width: int = 832
    height: int = 480
    seed: int = 0
    method: str = "self-forcing"  # one of SAMPLERS, with knobs as `refiner.choices` reads them
    policy: str = "window"  # one of POLICIES, likewise
    refiner: str | None = None
    refiner_strength: float = 1.0
    refined_levels: tuple[int, ...] | None = None  # None: those it was trained for
    refiner_form: Form = "auto"
    extend: Path | None = None
    save_latents: bool = False
    overwrite: bool = False
    sheet: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.width < 16 or self.height < 16 or self.width % 16 or self.height % 16:
            near = "x".join(str(max(16, round(n / 16) * 16)) for n in (self.width, self.height))
            raise ValueError(f"size {self.width}x{self.height}: both must be multiples of 16, the nearest is {near}")
        if self.out.suffix != ".mp4":
            raise ValueError(f"output {self.out} is not an .mp4: give a name that ends in .mp4")
        if not -100 <= self.refiner_strength <= 100:
            raise ValueError(f"strength {self.refiner_strength}: give a number from -100 to 100, 0 is the base")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}: give one from 0 to {(1 << 63) - 1}")
        check_prompt(self.prompt)

    @property
    def outputs(self) -> Outputs:
        """The files that this run writes."""
        return Outputs(self.out, self.sheet, self.extend, self.save_latents, self.overwrite)


def check_prompt(prompt: str) -> None:
    """Raise ValueError for bytes of another encoding, which Python keeps as lone surrogates, and for NULs."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        position = error.start + 1
        raise ValueError(f"the prompt is no UTF-8 text from character {position} on: save it as UTF-8") from None
    if "\0" in prompt:
        raise ValueError("the prompt holds NUL characters, as UTF-16 does: save it as UTF-8")


def unused(options: GenerateOptions) -> list[str]:
    """Options that were given and do nothing in this run, as on the command line."""
    embedded, tiny = options.model in (SPRITES, RANDOM_TINY), options.model == RANDOM_TINY
    given = {
        "--refiner-strength": options.refiner is None and options.refiner_strength != 1,
        "--refined-levels": options.refiner is None and options.refined_levels is not None,
        "--lora": bool(tiny and options.lora),
        "--tokenizer": embedded and options.tokenizer is not None,
        "--context-cache": embedded and options.context_cache is not None,
    }
    return [name for name, idle in given.items() if idle]


def notes(job: "Job") -> list[str]:
    """What a user should know of the request before it runs, a line each."""
    options = job.options
    told = [f"{name} does nothing in this run" for name in unused(options)]
    if options.extend and job.initial is None:
        told.append(f"{options.extend} holds no finished chunk: the clip starts anew")
    if job.begun and (others := differences(job.begun, job.metadata, job.plan.given)):
        told.append(f"{options.extend} was made with {others}: the clip goes on otherwise than it would have")
    if note := job.method.note(job.preset.all_steps, job.refiner.levels if job.refiner else ()):
        told.append(note)
    if options.model == RANDOM_TINY:
        return [*told, "random weights: the video is noise"]
    if options.model != SPRITES or options.context:
        return told
    told += misread(options.prompt)
    if (options.width, options.height) != SPRITES_SIZE:
        told.append("the sprites were trained at {}x{}: other sizes look wrong".format(*SPRITES_SIZE))
    return told


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was checked and counted: nothing is loaded yet."""

    options: GenerateOptions
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
    begun: dict[str, str] = field(default_factory=dict)  # the metadata of the latents to extend

    @property
    def metadata(self) -> dict[str, str]:
        """What the video and latents files say of themselves."""
        options = self.options
        return {
            "prompt": options.prompt,
            "seed": str(options.seed),
            "preset": self.preset_name,
            "steps": ",".join(map(str, self.preset.steps)),
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
            **({"lora": ", ".join(lora.describe() for lora in options.lora)} if options.lora else {}),
            **({"refiner": self.refiner.describe()} if self.refiner else {}),
        }


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is not known: use cpu, cuda, cuda:1 or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {name} is not here: this torch has no Apple GPU, use --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} is not here: this torch sees no GPU, use --device cpu")
    return device


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU and fp32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def prepare(options: GenerateOptions) -> Job:
    """Check a request and count its memory; raises ValueError with what to change. Loads no weights.

    A dry run is not held against the memory that is free.
    """
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    config, name, told = identify(options)
    preset = get_preset(name).changed(steps=options.steps, window=options.window, sink=options.sink)
    total = latent_frames(options.frames)
    shape = (config.in_dim, options.height // 8, options.width // 8)
    initial, begun = (None, {})
    if options.extend:
        initial, begun = read_given(options.extend, total, shape, preset.chunk)
    given = 0 if initial is None else initial.shape[2]
    method = choose(options.method, SAMPLERS, "method")
    policy = choose(options.policy, POLICIES, "policy")
    height, width = options.height // 8, options.width // 8
    plan = RunPlan(preset, total - given, height, width, given=given, policy=policy)
    refiner = plan_refiner(options, config, preset, dtype) if options.refiner else None
    method.check(preset, refiner.cache if refiner else None)
    memory = plan.memory(config, dtype, refined=refiner is not None)
    caches = method.caches(plan.chunks[-1].levels) if plan.chunks else ()
    estimate = Estimate(
        weights=parameter_count(config) * dtype.itemsize,
        refiner=refiner.nbytes if refiner else 0,
        kv=memory.nbytes * (1 + len(caches)),
        text_kv=text_kv_bytes(config, 1, config.text_len, dtype),
        activations=pass_bytes(config, memory, preset.chunk),
        decode=WanVAE.decode_bytes(vae_width(options), options.height, options.width, preset.chunk, dtype),
        text_encoder=text_encoder_bytes(options),
    )
    if refiner and refiner.form == "auto":
        refiner = refiner.chosen(merge=estimate.total <= available_bytes(device))
        estimate = replace(estimate, refiner=refiner.nbytes)
    job = Job(options, config, preset, name, told, plan, method, device, dtype, initial, estimate, refiner, begun)
    if not options.dry_run:
        options.outputs.check(job.metadata)
        estimate.check(available_bytes(device))
    return job


def plan_refiner(options: GenerateOptions, config: WanConfig, preset: Preset, dtype: torch.dtype) -> RefinerPlan:
    """The refiner that was asked for, read and checked, not yet on a device."""
    named = options.refiner in REFINERS
    path = sprite_refiner_file(options.refiner) if named else Path(options.refiner)
    return RefinerPlan.read(
        path, config, preset.all_steps, dtype,
        form=options.refiner_form, strength=options.refiner_strength, levels=options.refined_levels,
    )  # fmt: skip


def model_path(options: GenerateOptions) -> Path:
    """The transformer's file."""
    return WEIGHTS / FILES["student"] if options.model == SPRITES else Path(options.model)


def vae_path(options: GenerateOptions) -> Path | None:
    """The VAE's file, if there is one yet."""
    return WEIGHTS / FILES["vae"] if options.model == SPRITES and not options.vae else options.vae


def vae_width(options: GenerateOptions) -> int:
    """Base width of the VAE that will decode; the published one's where none is named yet."""
    path = vae_path(options)
    if path:
        return len(load_vae_state(path)["decoder.head.0.gamma"])  # mapped from the file, not read
    return RANDOM_VAE_DIM if options.model == RANDOM_TINY else 96


def text_encoder_bytes(options: GenerateOptions) -> int:
    """Of the text encoder's weights as they run; fp8 runs in bf16. Not counted where a cache may hold the prompt."""
    if options.context or not options.text_encoder or options.context_cache:
        return 0
    info = inspect(options.text_encoder)
    return info.nbytes * (2 if info.dtypes[0].startswith("float8") else 1)


def identify(options: GenerateOptions) -> tuple[WanConfig, str, str]:
    """Sizes of the model, the name of the preset it is sampled with, and how that is known."""
    if options.model == RANDOM_TINY:
        return WAN_TINY, options.preset or "self-forcing", "untrained"
    info = inspect(model_path(options), weights=options.weights, lora=options.lora)
    config = require_transformer(info)
    if options.preset:
        return config, options.preset, "as asked for"
    if info.preset:
        return config, info.preset, info.preset_reason
    raise ValueError(f"{options.model}: {info.preset_reason} (`autorefiner presets` lists them)")


def read_context(path: Path, config: WanConfig) -> Tensor:
    """A text encoder's output [1, L, text_dim] from a .safetensors (key `prompt_embeds` or `context`), zeros added.

    Raises ValueError when it is of another encoder or too long.
    """
    file = open_weights(path)
    tensors = file.groups.get("flat", {})
    key = next((key for key in ("prompt_embeds", "context") if key in tensors), None)
    if key is None or tensors[key].ndim not in (2, 3) or tensors[key].shape[-1] != config.text_dim:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:3]) or "nothing"
        raise ValueError(
            f"{path} holds {found}: a context file has `prompt_embeds` or `context` of [1, tokens, {config.text_dim}]"
        )
    context = file.read("flat", key).float()
    if context.ndim == 3 and len(context) != 1:
        raise ValueError(f"{path} holds {len(context)} prompts: give the context of one")
    context = context.reshape(-1, config.text_dim)
    if len(context) > config.text_len:
        raise ValueError(f"{path} has {len(context)} tokens, this model takes at most {config.text_len}: shorten it")
    return torch.nn.functional.pad(context, (0, 0, 0, config.text_len - len(context)))[None]


def make_context(job: Job) -> Tensor:
    """The prompt as the network takes it, [1, text_len, text_dim]."""
    options, config = job.options, job.config
    if options.context:
        return read_context(options.context, config)
    if options.text_encoder:
        encoder = load_text_encoder(
            options.text_encoder,
            options.tokenizer,
            device=job.device,
            text_len=config.text_len,
            cache_dir=options.context_cache,
        )
        if encoder.text_dim != config.text_dim:
            raise ValueError(
                f"{options.text_encoder} gives tokens of {encoder.text_dim}, this model takes {config.text_dim}: use"
                " the text encoder it was trained with"
            )
        context = encoder.encode([options.prompt])
        encoder.release()
        return context
    if options.model == SPRITES:
        return load_sprite_text()([options.prompt])
    if options.model == RANDOM_TINY:
        digest = hashlib.blake2b(options.prompt.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        return torch.randn(1, config.text_len, config.text_dim, generator=generator)
    raise ValueError("a prompt needs --text-encoder (a umT5 folder or file), or --context with its saved output")


def load_network(job: Job) -> CausalWan:
    """The transformer, on the device and in the dtype of the job."""
    if job.options.model == RANDOM_TINY:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = WanTransformer(job.config)
        return CausalWan(model.to(job.device, job.dtype).requires_grad_(False), job.config)
    options = job.options
    model, info = load_transformer(
        model_path(options), lora=options.lora, dtype=job.dtype, device=job.device, weights=options.weights
    )
    return CausalWan(model, info.config)


def load_vae(job: Job) -> WanVAE:
    """The decoder, on the device and in the dtype of the job."""
    path = vae_path(job.options)
    if path:
        vae = WanVAE.from_state_dict(load_vae_state(path))
    elif job.options.model == RANDOM_TINY:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = WanVAE(RANDOM_VAE_DIM)
    else:
        raise ValueError("latents need a decoder: give Wan2.1's VAE with --vae")
    return vae.to(job.device, job.dtype).requires_grad_(False)


@torch.no_grad()
def generate(job: Job, callback: Callable[[Progress], None] | None = None) -> Iterator[int]:
    """Sample, decode and write, chunk by chunk; yields the pixel frames in the file after each.

    An error or an interrupt leaves NAME.partial.mp4 (and the partial latents) with every chunk that was finished.
    """
    options = job.options
    vae = load_vae(job)
    state, frames = DecoderState(), 0
    with ExitStack() as stack:
        chunks = stack.enter_context(closing(sampled(job, callback)))
        next(chunks)  # the models are loaded before a file is touched
        video = stack.enter_context(
            VideoWriter(options.out, options.width, options.height, FPS, job.metadata, extends=job.plan.given > 0)
        )
        if options.save_latents:
            chunks = saving(chunks, stack.enter_context(latents_beside(job)))
        given = [] if job.initial is None else job.initial.split(job.preset.chunk, dim=2)
        for x0 in chain(given, chunks):
            pixels = vae.decode(x0.to(job.device, job.dtype), state)
            frames += pixels.shape[2]
            video.write(to_frames(pixels))
            yield frames
    options.outputs.remove_stale()
    if options.sheet:
        contact_sheet(read_frames(options.out, every=max(1, -(-options.frames // SHEET_FRAMES))), options.sheet)


def sampled(job: Job, callback: Callable[[Progress], None] | None) -> Iterator[Tensor | None]:
    """Load the models and yield None, then yield the x0 of each new chunk. Nothing is loaded where all are given."""
    if not job.plan.frames:
        yield None
        return
    context, network = make_context(job), load_network(job)
    if message := job.refiner and job.refiner.warning(network):
        warnings.warn(message, stacklevel=2)
    with job.refiner.attached(network) if job.refiner else nullcontext() as refiner:
        yield None
        chunks = sample(
            network, context, job.plan, seed=job.options.seed, initial=job.initial,
            method=job.method, callback=callback, refiner=refiner,
        )  # fmt: skip
        yield from finite(chunks, len(job.plan.given_chunks))


def saving(chunks: Iterator[Tensor], latents: LatentWriter) -> Iterator[Tensor]:
    """Put each chunk on disk before it is passed on, so that the latents never lack what the video shows."""
    for x0 in chunks:
        latents.write(x0)
        yield x0


def latents_beside(job: Job) -> LatentWriter:
    """A writer of the job's latents beside its video."""
    shape = (job.config.in_dim, job.plan.height, job.plan.width)
    return LatentWriter(job.options.outputs.latents, shape, job.metadata, job.initial)
