"""A sampling run of the sampler nodes: check it before anything is loaded, then sample the clip."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..refiner.acceleration import Acceleration
from ..refiner.choices import choose
from ..refiner.estimate import available_bytes
from ..refiner.memory.plan import MemoryPlan
from ..refiner.memory.store import PlainStore
from ..refiner.noise.refiner import Weights, own_weights
from ..refiner.noise.source import NoiseSource
from ..refiner.recipe import Recipe
from ..refiner.refiner_plan import RefinerPlan
from ..refiner.rollout import Progress
from ..refiner.sample import RunPlan, finite, sample
from ..refiner.samplers import SAMPLERS, Method
from ..refiner.samplers.search import Verifier
from ..refiner.schedule import Chunk, Preset, latent_frames
from ..refiner.timeline import Timeline
from ..refiner.wan.causal import CausalWan
from ..refiner.wan.transformer import WanConfig
from ..refiner.wan.vae import CHANNELS, normalized
from .options import CacheOptions, memory_text

CPU = torch.device("cpu")
LARGER = 4  # times the pixels that a model was made for: of this on it is mentioned
LONGEST = 16381  # pixel frames of a clip
WHITE = "white"  # the noise of the models' training, in NOISES


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Properties of a MODEL, known without loading it."""

    config: WanConfig
    dtype: torch.dtype  # that it computes in
    preset: str | None  # name
    device_bytes: int  # whole memory of its device
    start: Tensor | None = None  # raw latents [1 or B, 16, F, h, w] of core's ARVideoI2V
    device: torch.device = CPU
    size: tuple[int, int] | None = None  # width and height that it was made for, where known
    acceleration: Acceleration = field(default_factory=Acceleration)


class Search(Protocol):
    """A method that chooses among candidates by a reward (nodes/search.py)."""

    prompt: str

    def sampler(self, verifier: Verifier | None = None) -> Method:
        """Return the method; without a verifier it can be checked and counted, but not run."""
        ...

    def describe(self) -> str:
        """Describe the search in a few words."""
        ...

    def nbytes(self, plan: RunPlan) -> int:
        """Count the bytes that the search takes besides the model."""
        ...

    def verifier(
        self, batch: int, device: torch.device, prompts: Timeline[str] | None = None
    ) -> AbstractContextManager[Verifier]:
        """Enter with the verifier, whose models stay on the device until exit.

        `prompts` replace the search's own.
        """
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """A planned sampling run."""

    plan: RunPlan
    seed: int
    method: str  # one of SEARCHES with a `search`, else one of SAMPLERS with its knobs
    initial: Tensor | None = None  # normalised latents [B, C, given, h, w] to continue
    noise: NoiseSource | None = None  # None: white noise of the seed
    refined: RefinerPlan | None = None
    search: Search | None = None
    noise_text: str = WHITE  # describes `noise`
    recipe: Recipe = field(default_factory=Recipe)  # as `noise` and the plan have it already
    length: int | None = None  # latent frames before the recipe, given ones included
    source: Tensor | None = None  # normalised latents [B, C, F, h, w] that chunks start from
    given_noise: Tensor | None = None  # NOISE [B, C, F, h, w], where the run has one
    objects: tuple[Any, ...] = ()  # inputs that the clip depends on by their identity
    reused: int = 0  # the last given chunks, which are those of an earlier run

    def __post_init__(self) -> None:
        self.sampler().check(self.plan.preset, self.refined.cache if self.refined else None)

    def sampler(self, verifier: Verifier | None = None) -> Method:
        """Return the sampling method; a search can run with a verifier only."""
        if self.search:
            return self.search.sampler(verifier)
        return choose(self.method, SAMPLERS, "method")

    @property
    def caches(self) -> tuple[Hashable, ...]:
        """Names of the memories that the method holds besides the main one."""
        return self.sampler().caches(self.plan.levels) if self.plan.chunks else ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [B, C, F, h, w] of the whole clip, given frames included."""
        plan = self.plan
        return (plan.batch, CHANNELS, plan.given + plan.frames, plan.height, plan.width)

    def after(self, chunks: Sequence[Tensor]) -> "Run":
        """Return the run with its first new chunks, sampled by an earlier run, as given ones."""
        if not chunks:
            return self
        begun = [] if self.initial is None else [self.initial.float().cpu()]
        plan, initial = self.plan.after(len(chunks)), torch.cat([*begun, *chunks], 2)
        return replace(self, plan=plan, initial=initial, reused=len(chunks))

    def clip(
        self,
        network: CausalWan,
        context: Tensor | Timeline[Tensor],
        device: torch.device,
        dtype: torch.dtype,
        callback: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
        weights: Weights = own_weights,
        prompts: Timeline[str] | None = None,
        finished: Callable[[Chunk, Tensor], None] | None = None,
        acceleration: Acceleration | None = None,
    ) -> Tensor:
        """Sample the whole clip [B, C, F, h, w], normalised, fp32 on the CPU.

        Only one chunk at a time is on the device. The clip ends after the chunk at which `stop`
        returns True. `weights` returns a layer's weights for a merged refiner. `prompts` are the
        texts of a timeline, for a search. `finished` is called with each chunk as it is in the
        clip, given ones first.
        """
        clips = []
        for chunk, x0 in self._given():
            clips.append(x0)
            if finished is not None:
                finished(chunk, x0)
        attached = nullcontext()
        if self.refined:
            attached = self.refined.attached(network, device, dtype, weights)
        search = self.search
        judging = search.verifier(self.plan.batch, device, prompts) if search else nullcontext()
        acceleration = acceleration or Acceleration()
        with (
            attached as refiner,
            acceleration.attached(network, refiner, device) as (network, refiner),
            judging as verifier,
        ):
            chunks = sample(
                network,
                context,
                self.plan,
                seed=self.seed,
                noise=self.noise,
                initial=self.initial,
                source=self.source,
                method=self.sampler(verifier),
                refiner=refiner,
                callback=callback,
                device=device,
                dtype=dtype,
            )
            on_cpu = (chunk.float().cpu() for chunk in chunks)
            checked = finite(on_cpu, len(self.plan.given_chunks))
            for chunk, x0 in zip(self.plan.chunks, checked, strict=True):
                clips.append(x0)
                if finished is not None:
                    finished(chunk, x0)
                if stop is not None and stop():
                    chunks.close()
                    break
        return torch.cat(clips, dim=2)

    def _given(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield the given chunks with their latents."""
        if self.initial is None:
            return
        initial = self.initial.float().cpu()
        for chunk in self.plan.given_chunks:
            yield chunk, initial[:, :, chunk.start : chunk.start + chunk.length]


def check_length(length: int) -> None:
    """Raise ValueError for pixel frames that no clip has."""
    if not 1 <= length <= LONGEST:
        raise ValueError(f"length {length}: a clip has 1 to {LONGEST} pixel frames")
    latent_frames(length)


def video_latents(latent: dict, name: str) -> Tensor:
    """Return the tensor [B, 16, F, h, w] of a LATENT; ValueError names the input."""
    samples = latent.get("samples")
    shape = tuple(samples.shape) if isinstance(samples, Tensor) and not samples.is_nested else ()
    if len(shape) != 5 or shape[1] != CHANNELS or 0 in shape:
        raise ValueError(
            f"{name} has latents of shape {shape}, expected [batch, {CHANNELS}, frames, height/8,"
            " width/8]: encode with Wan2.1's VAE, or use EmptyARVideoLatent or Empty HunyuanVideo"
            " Latent"
        )
    return samples


def clip_shape(
    latent: dict | None, width: int, height: int, length: int, batch: int
) -> tuple[int, int, int, int]:
    """Return the clip's (batch, latent frames, height, width): of `latent`, else of the widgets."""
    if latent is not None:
        samples = video_latents(latent, "latent")
        return (samples.shape[0], *samples.shape[2:])
    if width % 16 or height % 16:
        near = "x".join(str(max(16, round(side / 16) * 16)) for side in (width, height))
        raise ValueError(
            f"width {width}, height {height}: both must be multiples of 16, the nearest is {near}"
        )
    return batch, latent_frames(length), height // 8, width // 8


def size_note(run: Run, facts: ModelFacts) -> str | None:
    """Return a warning if a clip is far larger than the model was made for."""
    if facts.size is None:
        return None
    width, height = 8 * run.plan.width, 8 * run.plan.height
    times = width * height / math.prod(facts.size)
    if times < LARGER:
        return None
    made = "x".join(map(str, facts.size))
    return (
        f"a clip of {width}x{height} pixels from a model that was made for {made}: it will not look"
        f" right, and every pass takes at least {times:.0f} times as long; set width to"
        f" {facts.size[0]} and height to {facts.size[1]}"
    )


def start_of(start: dict | None, facts: ModelFacts) -> dict | None:
    """Return the LATENT that a run continues: the connected one or the MODEL's, not both."""
    if facts.start is None:
        return start
    if start is not None:
        raise ValueError(
            "start is connected, and MODEL has a start image of its own (ARVideoI2V): keep one of"
            " them"
        )
    return {"samples": facts.start}


def begun_from(start: dict | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """Return the normalised latents that a clip of `shape` continues; ValueError if unfit."""
    if start is None:
        return None
    batch, frames, height, width = shape
    samples = video_latents(start, "start")
    if samples.shape[3:] != (height, width):
        came, wanted = (f"{8 * w}x{8 * h}" for h, w in (samples.shape[3:], (height, width)))
        raise ValueError(
            f"start is of {came} pixels and the clip of {wanted}: scale the image before it is"
            " encoded"
        )
    if len(samples) not in (1, batch):
        raise ValueError(
            f"start holds {len(samples)} clips and the batch {batch}: give 1 or {batch}"
        )
    if samples.shape[2] >= frames:
        raise ValueError(
            f"start holds {samples.shape[2]} latent frames and the clip has {frames} in all, start"
            f" included: set a length of at least {4 * samples.shape[2] + 1}"
        )
    return normalized(samples.float()).expand(batch, -1, -1, -1, -1).contiguous()


def plan_run(
    preset: Preset,
    shape: tuple[int, int, int, int],
    initial: Tensor | None,
    cache: CacheOptions | None = None,
) -> RunPlan:
    """Plan a clip of `shape` (batch, frames, height, width); ValueError if chunks do not fit."""
    batch, frames, height, width = shape
    given = 0 if initial is None else initial.shape[2]
    policy, store = (cache.policy, cache.store) if cache else (None, PlainStore)
    return RunPlan(preset, frames - given, height, width, batch, given, policy=policy, store=store)


def steered(plan: RunPlan, recipe: Recipe) -> RunPlan:
    """Return a plan as long as its recipe says; ValueError if no clip is that long."""
    if not recipe.commands:
        return plan
    frames = recipe.frames(plan)
    check_length(4 * frames - 3)
    return replace(plan, frames=frames - plan.given)


def memory_of(plan: RunPlan, facts: ModelFacts, refined: bool = False) -> MemoryPlan:
    """Plan the memory of a run; the model need not be loaded."""
    return plan.memory(facts.config, facts.dtype, refined)


def kv_bytes(run: Run, facts: ModelFacts) -> tuple[int, int]:
    """Count the bytes of keys and values in all memories of a run: on the device, and in the
    host's memory besides."""
    refined = run.refined is not None
    memories = run.plan.memories(facts.config, facts.dtype, refined, run.caches)
    on_device, on_host = zip(*(each.bytes_on(facts.device) for each in memories), strict=True)
    return sum(on_device), sum(on_host)


def held_bytes(run: Run, facts: ModelFacts) -> int:
    """Count the bytes that a run takes on the device besides the model: K/V, refiner, search."""
    refiner = run.refined.nbytes if run.refined else 0
    search = run.search.nbytes(run.plan) if run.search else 0
    return kv_bytes(run, facts)[0] + refiner + search


def bytes_text(on_device: int, on_host: int) -> str:
    """Write the bytes of keys and values."""
    text = f"{on_device / 1e6:,.1f} MB of keys and values"
    return f"{text}, {on_host / 1e6:,.1f} MB in host memory" if on_host else text


def summary(run: Run, facts: ModelFacts) -> str:
    """Describe a run in one line: frames, K/V bytes, and what is not the default."""
    plan = run.plan
    held = bytes_text(*kv_bytes(run, facts))
    line = f"{plan.frames} latent frames in {len(plan.chunks)} chunks, {held}"
    line += memory_text(plan.policy, plan.store)
    if ":" in run.method:
        line += f"; {run.method}"
    if run.noise_text != WHITE:
        line += f"; noise {run.noise_text}"
    if run.refined:
        line += f"; {run.refined.describe()}, {run.refined.nbytes / 1e6:,.1f} MB"
    refined = run.refined.levels if run.refined else ()
    if note := run.sampler().note(plan.preset.all_levels, refined):
        line += f"; {note}"
    return line + (f"; {run.search.describe()}" if run.search else "")


def check_memory(run: Run, facts: ModelFacts) -> None:
    """Raise ValueError if latents, or what a run holds besides the model, exceed the memory."""
    nbytes, latents = held_bytes(run, facts), 4 * math.prod(run.shape)
    on_host, free = kv_bytes(run, facts)[1], available_bytes(CPU)
    if latents + on_host > free:
        what = "latents" + (" and the offloaded keys and values" if on_host else "")
        raise ValueError(
            f"the {what} of this clip take {(latents + on_host) / 1e9:.1f} GB and"
            f" {free / 1e9:.1f} GB of memory are free: make it smaller, shorter, or the batch"
            " smaller"
        )
    if nbytes > facts.device_bytes:
        what = "keys and values" + (" and the refiner" if run.refined else "")
        instead = (
            "connect a Reflective Cache with a smaller window, or make the clip smaller or shorter"
        )
        if run.search:
            what += " and the search's VAE and reward"
            instead = f"choose another method, {instead}"
        raise ValueError(
            f"the {what} of this clip take {nbytes / 1e9:.2f} GB and the device has"
            f" {facts.device_bytes / 1e9:.2f} GB: {instead}"
        )
