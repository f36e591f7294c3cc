"""Sections of `gpu.py`: each function measures one and returns its figures for the JSON."""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from autorefiner.refiner.bench import (  # noqa: E402
    SIZES,
    BenchSize,
    clock,
    measure_matmul,
    pass_flops,
    random_model,
    synchronize,
)
from autorefiner.refiner.bench_refiner import random_pairs  # noqa: E402
from autorefiner.refiner.memory.reflect import ReflectiveCache  # noqa: E402
from autorefiner.refiner.noise.refiner import Branches, Refiner, merged  # noqa: E402
from autorefiner.refiner.noise.source import WhiteNoise  # noqa: E402
from autorefiner.refiner.rollout import Rollout  # noqa: E402
from autorefiner.refiner.run_plan import RunPlan  # noqa: E402
from autorefiner.refiner.sample import sample  # noqa: E402
from autorefiner.refiner.schedule import PRESETS, Chunk  # noqa: E402
from autorefiner.refiner.training.dmd_objective import DmdObjective  # noqa: E402
from autorefiner.refiner.training.options import RefineOptions  # noqa: E402
from autorefiner.refiner.training.refiner_stage import RefinerStage  # noqa: E402
from autorefiner.refiner.wan.causal import CausalWan  # noqa: E402
from autorefiner.refiner.wan.fp8_linear import multiplies_fp8, with_fp8  # noqa: E402
from autorefiner.refiner.wan.transformer import WanConfig  # noqa: E402
from autorefiner.refiner.wan.vae import DecoderState, WanVAE  # noqa: E402

from golden_cases import (  # noqa: E402, the recorded cases of the tests
    distance,
    forward_outputs,
    golden_files,
    relative_distance,
    rollout_outputs,
    vae_outputs,
)

ROUNDS = 5
TOP_KERNELS = 12
NO_FP8 = "this device does not multiply fp8: CUDA compute capability 8.9 or higher does"
SMALLEST = WanConfig(dim=128, num_heads=1, ffn_dim=128, num_layers=2, text_dim=32, text_len=8)
SIZES["rehearsal"] = BenchSize(SMALLEST, 4, 4, 8)  # tries every section on a CPU


@dataclass(frozen=True, slots=True)
class Kit:
    """The device, and the sizes of what is measured on it."""

    device: torch.device
    size: str = "1.3b"
    large: str = "14b"  # two of its layers are measured
    dtype: torch.dtype = torch.bfloat16
    steady_chunks: int = 4  # timed, after the window is full

    @property
    def case(self) -> BenchSize:
        """The model's sizes and the clip's."""
        return SIZES[self.size]

    def peak(self) -> float:
        """Peak memory since the last call, in GB; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        return round(peak, 3)


@dataclass(frozen=True, slots=True)
class Setting:
    """A memory, a chunk length and a batch."""

    name: str
    window: int
    sink: int = 0
    chunk: int = 3
    batch: int = 1

    def plan(self, kit: Kit, chunks: int) -> RunPlan:
        """Plan a run of so many chunks."""
        preset = PRESETS["self-forcing"].changed(
            window=self.window, sink=self.sink, chunk=self.chunk
        )
        case = kit.case
        return RunPlan(preset, self.chunk * chunks, case.height, case.width, self.batch)

    @property
    def filling_chunks(self) -> int:
        """Chunks until the window is full."""
        return -(-self.window // self.chunk)


SETTINGS = (
    Setting("21 visible frames", 21),
    Setting("window 12, sink 3", 12, 3),
    Setting("window 12, sink 3, chunks of 1", 12, 3, chunk=1),
    Setting("window 12, sink 3, batch of 4", 12, 3, batch=4),
)


def card(kit: Kit) -> dict:
    """Name the device and the versions; measure a large matrix product."""
    cuda = kit.device.type == "cuda"
    ours, theirs = measure_matmul(kit.device, kit.dtype)
    return {
        "device": torch.cuda.get_device_name(kit.device) if cuda else "cpu",
        "memory_gb": torch.cuda.get_device_properties(kit.device).total_memory / 1e9 if cuda else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "matmul_tflops": max(ours, theirs) / 1e3,
    }


def golden(kit: Kit) -> dict:
    """Compare with the recorded cases.

    fp32 absolutely (at most 2e-5), bf16 (2e-2) and products in fp8 (5e-2) relatively.
    """
    results = {}
    for path in golden_files("forward", "rollout", "vae"):
        for dtype, measure, limit in (
            (torch.float32, distance, 1e-4 if path.stem == "vae" else 2e-5),
            (torch.bfloat16, relative_distance, 2e-2),
        ):
            worst = max(measure(*pair) for pair in golden_pairs(path, kit.device, dtype))
            name = f"{path.stem} {str(dtype).removeprefix('torch.')}"
            results[name] = {"difference": worst, "limit": limit, "passes": worst <= limit}
        if path.stem != "vae":
            results[f"{path.stem} fp8"] = golden_fp8(kit, path)
    return results


def golden_fp8(kit: Kit, path: Path) -> dict:
    """Compare products in fp8 with a recorded case, relatively."""
    if not multiplies_fp8(kit.device):
        return {"skipped": NO_FP8}
    pairs = golden_pairs(path, kit.device, torch.bfloat16, fp8=True)
    worst = max(relative_distance(*pair) for pair in pairs)
    return {"difference": worst, "limit": 5e-2, "passes": worst <= 5e-2}


def golden_pairs(
    path: Path, device: torch.device, dtype: torch.dtype, fp8: bool = False
) -> Sequence[tuple[Tensor, Tensor]]:
    """Return our tensors and the recorded ones of a case."""
    if path.stem == "vae":
        return vae_outputs(path, device, dtype)
    if path in golden_files("forward"):
        return forward_outputs(path, device, dtype, fp8)
    return [rollout_outputs(path, device, dtype, fp8)]


@dataclass(slots=True)
class Models:
    """A base with random weights, and refiners of every form on it."""

    base: CausalWan
    refiners: dict[str, Refiner | None]
    context: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, kit: Kit) -> "Models":
        """Draw the weights on the device."""
        config = kit.case.config
        base = CausalWan(random_model(config, kit.device, kit.dtype), config)
        pairs = random_pairs(base, kit.device, kit.dtype)
        copied, branches = merged(base, pairs), Branches(base.model, pairs)
        refiners: dict[str, Refiner | None] = {"base": None}
        for previous in ("pending", "joint"):
            cache = ReflectiveCache("shared", previous)
            refiners[f"{previous}, merged"] = Refiner(copied, cache)
            refiners[f"{previous}, unmerged"] = Refiner(base, cache, on=branches.on)
        shape = 1, config.text_len, config.text_dim
        return cls(base, refiners, torch.randn(shape, device=kit.device, dtype=kit.dtype))


@torch.no_grad()
def sampling(kit: Kit) -> dict:
    """Time chunks, every pass counted, the one that writes memory included, by setting and form."""
    models, results = Models.of(kit), {}
    for setting in SETTINGS:
        several = setting.chunk == 3 and setting.batch == 1
        forms = models.refiners if several else {"base": None}
        for form, refiner in forms.items():
            results[f"{setting.name}: {form}"] = steady_chunk(kit, models, setting, refiner)
    return results | sampling_fp8(kit, models, SETTINGS[1])


def steady_chunk(kit: Kit, models: Models, setting: Setting, refiner: Refiner | None) -> dict:
    """Time a chunk in a full window."""
    kit.peak()
    chunks = setting.filling_chunks + kit.steady_chunks + 1  # the last is not committed
    plan = setting.plan(kit, chunks)
    run = sample(models.base, models.context, plan, refiner=refiner)
    steady = statistics.median(chunk_seconds(run, kit.device)[setting.filling_chunks : -1])
    memory = plan.memory(kit.case.config, kit.dtype, refined=refiner is not None)
    return {
        "chunk_ms": 1e3 * steady,
        "frames_per_second": 4 * setting.chunk * setting.batch / steady,
        "kv_gb": memory.nbytes / 1e9,
        "peak_gb": kit.peak(),
    }


def sampling_fp8(kit: Kit, models: Models, setting: Setting) -> dict:
    """Time chunks with products in fp8: of the base, and of a merged refiner."""
    forms = {"base": None, "pending, merged": models.refiners["pending, merged"]}
    if not multiplies_fp8(kit.device):
        return {f"{setting.name}: {form}, fp8": {"skipped": NO_FP8} for form in forms}
    results, converted = {}, Models(with_fp8(models.base), {}, models.context)
    for form, refiner in forms.items():
        active = refiner and replace(refiner, network=with_fp8(refiner.network))
        results[f"{setting.name}: {form}, fp8"] = steady_chunk(kit, converted, setting, active)
    return results


def chunk_seconds(chunks: Iterator[Tensor], device: torch.device) -> list[float]:
    """Return the seconds between the ends of two chunks, and of the first from the start."""
    times = [perf_counter()]
    for _ in chunks:
        synchronize(device)
        times.append(perf_counter())
    return [late - early for early, late in pairwise(times)]


@torch.no_grad()
def passes(kit: Kit) -> dict:
    """Time one pass of each kind in a full window; state its share of the matrix product's rate."""
    models, results = Models.of(kit), {}
    rate = max(measure_matmul(kit.device, kit.dtype)) * 1e9
    for setting in SETTINGS[:2]:
        for form, refiner in models.refiners.items():
            rollout, chunk = full_rollout(kit, models, setting, refiner)
            results[f"{setting.name}: {form}"] = pass_times(kit, rollout, chunk, rate)
            rollout.free()
    return results


def full_rollout(
    kit: Kit, models: Models, setting: Setting, refiner: Refiner | None
) -> tuple[Rollout, Chunk]:
    """Return a rollout whose window is full, and its next chunk."""
    plan = setting.plan(kit, setting.filling_chunks + 2)
    rollout = Rollout.of(models.base, models.context, plan, WhiteNoise(0), refiner=refiner)
    *chunks, chunk, _ = plan.chunks
    for each in chunks:
        rollout.commit(rollout.draw(each, each.levels[0]), each)
    return rollout, chunk


def pass_times(kit: Kit, rollout: Rollout, chunk: Chunk, rate: float) -> dict:
    """Return milliseconds of a denoise, a write and a refine pass, and the denoise's share."""
    _, level, *_ = chunk.levels
    x = rollout.draw(chunk, chunk.levels[0])
    kinds: dict[str, Callable[[], object]] = {
        "denoise": lambda: rollout.predict(x, level, chunk),
        "write": lambda: write(rollout, x, chunk),
    }
    if rollout.refiner is not None:
        x0 = rollout.predict(x, level, chunk)
        kinds = {"refine": lambda: rollout.residual(x, x0, level, chunk)}
    results = {}
    for kind, run in kinds.items():
        run()
        seconds = statistics.median(clock(run, kit.device) for _ in range(ROUNDS))
        results[f"{kind}_ms"] = 1e3 * seconds
    if "denoise_ms" in results:
        tokens = chunk.length * rollout.memory.plan.frame_tokens
        keys = rollout.memory.plan.window_frames * rollout.memory.plan.frame_tokens
        flops = pass_flops(kit.case.config, tokens, keys, kit.case.config.text_len)
        results["share"] = flops / (results["denoise_ms"] / 1e3) / rate
    return results


def write(rollout: Rollout, x: Tensor, chunk: Chunk) -> None:
    """Run the pass of a commit, without committing."""
    t = torch.zeros((1, 1), dtype=torch.float64)
    view = rollout.memory.view(chunk.frames)
    rollout.network(x.to(rollout.network_dtype), t, rollout.text, view, keys_only=True)


@torch.no_grad()
def first_frames(kit: Kit) -> dict:
    """Time from the prompt's context to the first decoded frames, models loaded and warm."""
    models, vae, results = Models.of(kit), vae_of(kit), {}
    for setting in SETTINGS[1:3]:
        plan = setting.plan(kit, 2)

        def run(plan: RunPlan = plan) -> None:
            chunks = sample(models.base, models.context, plan)
            vae.decode(next(chunks).to(kit.dtype), DecoderState())
            chunks.close()

        run()
        seconds = statistics.median(clock(run, kit.device) for _ in range(ROUNDS))
        results[setting.name] = {"first_frames_s": seconds}
    return results


def vae_of(kit: Kit) -> WanVAE:
    """Return a decoder with random weights."""
    return WanVAE(kit.case.vae_dim).to(kit.device, kit.dtype).requires_grad_(False)


@torch.no_grad()
def profiled(kit: Kit) -> dict:
    """Profile a chunk in a full window: the longest kernels, and the device's idle share."""
    models, setting = Models.of(kit), SETTINGS[1]
    rollout, chunk = full_rollout(kit, models, setting, None)
    level = chunk.levels[1]
    x = rollout.draw(chunk, chunk.levels[0])
    rollout.predict(x, level, chunk)
    activities = [ProfilerActivity.CPU]
    if kit.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        wall = clock(lambda: [rollout.predict(x, level, chunk) for _ in range(4)], kit.device)
    rollout.free()
    events = record.key_averages()
    column = "self_device_time_total" if kit.device.type == "cuda" else "self_cpu_time_total"
    busy = sum(getattr(event, column) for event in events) / 1e6
    longest = sorted(events, key=lambda event: -getattr(event, column))[:TOP_KERNELS]
    return {
        "idle_share": max(0.0, 1 - busy / wall),
        "kernels": {event.key[:80]: getattr(event, column) / 1e6 / busy for event in longest},
    }


@torch.no_grad()
def large_layers(kit: Kit) -> dict:
    """Time a pass through two layers of the large model; state its share of the product's rate."""
    case = SIZES[kit.large]
    config = replace(case.config, num_layers=2)
    rate = max(measure_matmul(kit.device, kit.dtype)) * 1e9
    model = CausalWan(random_model(config, kit.device, kit.dtype), config)
    shape = 1, config.text_len, config.text_dim
    models = Models(model, {}, torch.randn(shape, device=kit.device, dtype=kit.dtype))
    two_layers = replace_case(kit, BenchSize(config, case.height, case.width, case.vae_dim))
    rollout, chunk = full_rollout(two_layers, models, SETTINGS[1], None)
    return pass_times(two_layers, rollout, chunk, rate)


def replace_case(kit: Kit, case: BenchSize) -> Kit:
    """Return the kit with a case of its own."""
    name = f"{kit.large}, {case.config.num_layers} layers"
    SIZES[name] = case
    return replace(kit, size=name)


def training_step(kit: Kit) -> dict:
    """Time steps of a refiner's training by distribution matching, with checkpointing."""
    kit.peak()
    case = kit.case
    options = RefineOptions(
        rank=128, steps=4, batch=1, accumulation=1, frames=9, height=case.height, width=case.width,
        ratio=1, critic_warmup=0, checkpointing=True, shown=1,
    )  # fmt: skip
    base, teacher = (
        CausalWan(random_model(case.config, kit.device, kit.dtype), case.config) for _ in range(2)
    )
    tokens = case.config.text_len, case.config.text_dim

    def encode(prompts: list[str]) -> Tensor:
        return torch.randn(len(prompts), *tokens, device=kit.device)

    objective = DmdObjective(options, teacher, encode)
    stage = RefinerStage(options, base, objective, ["one"], encode, lambda *_: {})
    stage.allocate()
    stage.step(0)
    seconds = [clock(lambda step=step: stage.step(step), kit.device) for step in (1, 2, 3)]
    return {"step_s": statistics.median(seconds), "peak_gb": kit.peak()}


SECTIONS: dict[str, Callable[[Kit], dict]] = {
    "card": card,
    "golden": golden,
    "sampling": sampling,
    "passes": passes,
    "first_frames": first_frames,
    "profile": profiled,
    "large_layers": large_layers,
    "training_step": training_step,
}
