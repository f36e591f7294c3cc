"""What a refiner costs: the base and every form of the refiner, taking turns in one run."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from .bench import SIZES, random_model, synchronize
from .estimate import available_bytes, parameter_count
from .memory.reflect import ReflectiveCache
from .noise.refiner import Branches, Refiner, merged, target_modules
from .sample import RunPlan, sample
from .schedule import PRESETS
from .wan.causal import CausalWan
from .wan.lora import LoraPair

RANK, HEAD_RANK, ROUNDS = 128, 64, 5


@dataclass(frozen=True, slots=True)
class RefinerReport:
    """Median milliseconds of a chunk by form, over all rounds and all chunks but the first and the
    last."""

    size: str
    device: str
    dtype: str
    threads: int
    rank: int
    chunk_ms: dict[str, float]
    passes: dict[str, int]  # of the transformer, for a whole run, base's and refiner's

    def table(self) -> str:
        """Aligned, a form a line."""
        base = self.chunk_ms["base"]
        lines = [
            f"{self.size}, {self.device}, {self.dtype}, {self.threads} threads, rank {self.rank}"
        ]
        for name, ms in self.chunk_ms.items():
            lines.append(
                f"  {name:<20}{ms:9.1f} ms a chunk{ms / base:7.2f} x{self.passes[name]:6d} passes"
            )
        return "\n".join(lines)


def bench_refiner(
    size: str, device: torch.device, dtype: torch.dtype, chunks: int, window: int = -1
) -> RefinerReport:
    """Sample `chunks` chunks (at least 3) with random weights and every form of a random refiner,
    in turns.

    Raises ValueError, before anything is loaded, when base and merged copy do not fit.
    """
    if chunks < 3:
        raise ValueError(
            f"{chunks} chunks: give at least 3, the first warms up and the last is not committed"
        )
    case, preset = SIZES[size], PRESETS["self-forcing"].changed(window=window)
    needed, there = 2 * parameter_count(case.config) * dtype.itemsize, available_bytes(device)
    if needed > there:
        raise ValueError(
            f"base and merged copy take {needed / 1e9:.1f} GB and {there / 1e9:.1f} GB are free"
        )
    with torch.no_grad():
        base = CausalWan(random_model(case.config, device, dtype), case.config)
        pairs = random_pairs(base, device, dtype)
        copied, branches = merged(base, pairs), Branches(base.model, pairs)
        forms: dict[str, Callable[[], Refiner] | None] = {"base": None}
        for previous in ("pending", "joint"):
            cache = ReflectiveCache("shared", previous)
            forms[f"{previous}, merged"] = lambda cache=cache: Refiner(copied, cache)
            forms[f"{previous}, branches"] = lambda cache=cache: Refiner(
                base, cache, on=branches.on
            )
        context = torch.randn(
            1, case.config.text_len, case.config.text_dim, device=device, dtype=dtype
        )
        plan = RunPlan(preset, preset.chunk * chunks, case.height, case.width)
        times: dict[str, list[float]] = {name: [] for name in forms}
        counts: dict[str, int] = {}
        for round_ in range(ROUNDS + 1):
            for name, make in forms.items():
                seconds, passes = chunk_seconds(
                    base, copied, context, plan, make() if make else None, device
                )
                counts[name] = passes
                times[name] += seconds if round_ else []  # the first round warms up
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    told = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return RefinerReport(
        size,
        told,
        str(dtype).removeprefix("torch."),
        torch.get_num_threads(),
        RANK,
        medians,
        counts,
    )


def random_pairs(base: CausalWan, device: torch.device, dtype: torch.dtype) -> dict[str, LoraPair]:
    """Factors of the usual rank for every layer."""
    pairs = {}
    for name, module in target_modules(base.model).items():
        out, into = module.weight.shape
        rank = min(RANK, HEAD_RANK if name == "head.head" else RANK)
        down, up = (
            0.01 * torch.randn(*shape, device=device, dtype=dtype)
            for shape in ((rank, into), (out, rank))
        )
        pairs[name] = LoraPair(down, up, 1.0)
    return pairs


def chunk_seconds(
    base: CausalWan, copied: CausalWan, context: torch.Tensor, plan: RunPlan, refiner: Refiner | None,
    device: torch.device,
) -> tuple[list[float], int]:  # fmt: skip
    """Seconds of each chunk but the first and the last, and how often a time embedding was asked
    for: the passes."""
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    embeddings = {
        id(network.model.time_embedding): network.model.time_embedding for network in (base, copied)
    }
    handles = [module.register_forward_hook(count) for module in embeddings.values()]
    try:
        ends = []
        for _ in sample(base, context, plan, refiner=refiner):
            synchronize(device)
            ends.append(time.perf_counter())
    finally:
        for handle in handles:
            handle.remove()
    return [late - early for early, late in pairwise(ends[:-1])], passes
