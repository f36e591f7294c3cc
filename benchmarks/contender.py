"""One implementation of causal sampling, and the clock that times its passes; this pack is one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from time import perf_counter

import torch
from gpu_sections import Kit
from torch import Tensor, nn

from autorefiner.refiner.bench import synchronize
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS, Level
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer

CHUNK = 3  # latent frames
WINDOW = 21  # latent frames that a chunk sees, itself included
FILLING = WINDOW // CHUNK  # chunks until the window is full
PRESET = PRESETS["self-forcing"].changed(window=WINDOW, chunk=CHUNK)
PASSES = len(PRESET.levels) + 1  # of a chunk: the last one writes its K/V at t = 0
TEXT_DIM = 4096  # ComfyUI accepts no other
SELF_ATTENTION = 2  # factor of its query and key norms and of its output


class Passes:
    """Begin and end of each pass through a network, on the device's clock; nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begins: list = []
        self.ends: list = []

    def instant(self) -> object:
        """Record a CUDA event, or read the clock."""
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time what runs inside as one pass."""
        self.begins.append(self.instant())
        yield
        self.ends.append(self.instant())

    def hook(self, network: nn.Module) -> None:
        """Time every call of a module."""
        network.register_forward_pre_hook(lambda *_: self.begins.append(self.instant()))
        network.register_forward_hook(lambda *_: self.ends.append(self.instant()))

    def clear(self) -> None:
        """Forget the passes so far."""
        self.begins.clear()
        self.ends.clear()

    def milliseconds(self, begin: object, end: object) -> float:
        """Return the time between two instants."""
        return begin.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - begin)

    def chunk_figures(self, chunk: int) -> dict[str, list[float]]:
        """Return the milliseconds of a chunk's passes, and from the end of the chunk before."""
        first, write = PASSES * chunk, PASSES * (chunk + 1) - 1
        if len(self.ends) <= write:
            raise RuntimeError(f"{len(self.ends)} passes ran, {PASSES} a chunk are expected")
        times = [
            self.milliseconds(self.begins[index], self.ends[index])
            for index in range(first, write + 1)
        ]
        whole = self.milliseconds(self.ends[first - 1], self.ends[write])
        return {"pass_ms": times[:-1], "write_ms": times[-1:], "chunk_ms": [whole]}


@dataclass(frozen=True)
class Job:
    """What every implementation runs: sizes, random weights, prompt; seeded."""

    kit: Kit

    @property
    def config(self) -> WanConfig:
        return replace(self.kit.case.config, text_dim=TEXT_DIM)

    @property
    def frame_tokens(self) -> int:
        return self.kit.case.height * self.kit.case.width // 4

    @property
    def level(self) -> Level:
        """The level of the compared chunk: the second."""
        return PRESET.chunk_levels()[1]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Wan2.1's state dict in host memory, drawn on the device as torch initialises it.

        Self-attention is sharper and stronger than that: else a past at a wrong place would change
        the compared chunk by 1e-2 only, which the limit of bf16 lets pass. By 2 it is 2.5e-2 to
        5e-2, at 2 to 30 layers; by 3, rounding alone exceeds the limit at 30.
        """
        torch.manual_seed(0)
        with torch.device(self.kit.device):
            model = WanTransformer(self.config).to(self.kit.dtype)
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        for name, tensor in weights.items():
            if name.endswith(
                ("self_attn.norm_q.weight", "self_attn.norm_k.weight", "self_attn.o.weight")
            ):
                tensor.mul_(SELF_ATTENTION)
        return weights

    @cached_property
    def context(self) -> Tensor:
        """The prompt [1, L, text_dim] on the device."""
        shape = 1, self.config.text_len, self.config.text_dim
        return self.random(shape, 1).to(self.kit.dtype)

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Latents of a chunk of the past and of the noisy chunk after it, [1, C, F, h, w]."""
        return tuple(self.latents(CHUNK, seed).float() for seed in (2, 3))

    def latents(self, frames: int, seed: int) -> Tensor:
        """Draw latents [1, C, F, h, w]."""
        shape = 1, self.config.in_dim, frames, self.kit.case.height, self.kit.case.width
        return self.random(shape, seed).to(self.kit.dtype)

    def random(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Draw from a generator of its own."""
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(self.kit.device)

    def plan(self, chunks: int) -> RunPlan:
        """Plan a run of this pack."""
        return RunPlan(PRESET, CHUNK * chunks, self.kit.case.height, self.kit.case.width)


@dataclass(frozen=True, slots=True)
class Contender:
    """An implementation, loaded: how it samples a clip, and which chunks of it are timed."""

    passes: Passes
    sample: Callable[[], object]
    second_chunk: Callable[[], Tensor]  # x0 of the job's pair, [1, C, F, h, w]
    timed: range  # chunks of a clip; each sees WINDOW frames
    clips: int = 1
    note: str = ""

    def figures(self, kit: Kit) -> dict:
        """Time passes and chunks, after a clip that warms up; take medians."""
        self.sample()
        kit.peak()
        figures: dict[str, list[float]] = {"pass_ms": [], "write_ms": [], "chunk_ms": []}
        for _ in range(self.clips):
            self.passes.clear()
            self.sample()
            synchronize(kit.device)
            for chunk in self.timed:
                for name, values in self.passes.chunk_figures(chunk).items():
                    figures[name] += values
        medians = {name: median(values) for name, values in figures.items()}
        medians["frames_per_second"] = 4e3 * CHUNK / medians["chunk_ms"]
        return {**medians, "peak_gb": kit.peak()} if kit.device.type == "cuda" else medians


@dataclass(frozen=True, slots=True)
class TimedWan(CausalWan):
    """A network whose calls are timed."""

    passes: Passes | None = None

    def __call__(self, *arguments, **options) -> Tensor | None:
        with self.passes.timed():
            return CausalWan.__call__(self, *arguments, **options)


def autorefiner(job: Job) -> Contender:
    """Load this pack."""
    with torch.device("meta"):
        model = WanTransformer(job.config)
    weights = {name: tensor.to(job.kit.device) for name, tensor in job.weights.items()}
    model.load_state_dict(weights, assign=True)
    passes = Passes(job.kit.device)
    network = TimedWan(model.requires_grad_(False).eval(), job.config, passes=passes)
    steady = range(FILLING, FILLING + job.kit.steady_chunks)
    plan = job.plan(steady.stop + 1)  # the last is not committed

    @torch.no_grad()
    def second_chunk() -> Tensor:
        rollout = Rollout.of(network, job.context, job.plan(3), WhiteNoise(0))
        past, noisy = job.pair
        rollout.commit(past, rollout.chunks[0])
        return rollout.predict(noisy, job.level, rollout.chunks[1])

    def run() -> None:
        for _ in sample(network, job.context, plan):
            pass

    return Contender(passes, run, second_chunk, steady)
