"""Measure the cost of a refiner: the base and every form of the refiner, taking turns."""

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import torch

from .acceleration import Acceleration
from .bench import SIZES, plan_bench, random_model, synchronize
from .estimate import available_bytes, parameter_count
from .memory.reflect import ReflectiveCache
from .noise.refiner import Branches, Refiner, merged, target_modules
from .sample import RunPlan, sample
from .wan.causal import CausalWan
from .wan.lora import LoraPair

RANK, HEAD_RANK, ROUNDS = 128, 64, 5


@dataclass(frozen=True, slots=True)
class RefinerReport:
    """Median milliseconds of a chunk by form, without the first and the last chunk of a run."""

    size: str
    device: str
    dtype: str
    threads: int
    rank: int
    chunk_ms: dict[str, float]
    passes: dict[str, int]  # transformer passes of a whole run, by base and refiner together

    def table(self) -> str:
        """Format as an aligned table, one form a line."""
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
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    chunks: int,
    window: int | None = None,
    store: str = "plain",
    memory: str = "window",
    acceleration: Acceleration | None = None,
) -> RefinerReport:
    """Sample `chunks` chunks with random weights, with the base and every form of a refiner.

    Raises ValueError for fewer than 3 chunks, and before anything is loaded when base and merged
    copy do not fit into memory.
    """
    if chunks < 3:
        raise ValueError(
            f"{chunks} chunks: give at least 3, the first warms up and the last is not committed"
        )
    acceleration = acceleration or Acceleration()
    case = SIZES[size]
    plan = plan_bench(case, chunks, window, store, memory)
    needed, free = 2 * parameter_count(case.config) * dtype.itemsize, available_bytes(device)
    if needed > free:
        raise ValueError(
            f"base and merged copy take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free:"
            " measure a smaller --size"
        )
    with torch.no_grad():
        base = CausalWan(random_model(case.config, device, dtype), case.config)
        pairs = random_pairs(base, device, dtype)
        copied, branches = merged(base, pairs), Branches(base.model, pairs)
        forms: dict[str, Refiner | None] = {"base": None}
        for previous in ("pending", "joint"):
            cache = ReflectiveCache("shared", previous)
            forms[f"{previous}, merged"] = Refiner(copied, cache)
            forms[f"{previous}, unmerged"] = Refiner(base, cache, on=branches.on)
        tokens = case.config.text_len, case.config.text_dim
        context = torch.randn(1, *tokens, device=device, dtype=dtype)
        times: dict[str, list[float]] = {name: [] for name in forms}
        counts: dict[str, int] = {}
        for round_ in range(ROUNDS + 1):
            for name, refiner in forms.items():
                with acceleration.attached(base, refiner, device) as (network, faster):
                    seconds, passes = chunk_seconds(network, copied, context, plan, faster, device)
                counts[name] = passes
                times[name] += seconds if round_ else []  # the first round warms up
    return RefinerReport(
        size=size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        rank=RANK,
        chunk_ms={name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
        passes=counts,
    )


def random_pairs(base: CausalWan, device: torch.device, dtype: torch.dtype) -> dict[str, LoraPair]:
    """Draw factors of the usual rank for every layer."""
    pairs = {}
    for name, module in target_modules(base.model).items():
        out, into = module.weight.shape
        rank = min(RANK, HEAD_RANK if name == "head.head" else RANK)
        down = 0.01 * torch.randn(rank, into, device=device, dtype=dtype)
        up = 0.01 * torch.randn(out, rank, device=device, dtype=dtype)
        pairs[name] = LoraPair(down, up, 1.0)
    return pairs


def chunk_seconds(
    base: CausalWan,
    copied: CausalWan,
    context: torch.Tensor,
    plan: RunPlan,
    refiner: Refiner | None,
    device: torch.device,
) -> tuple[list[float], int]:
    """Return seconds of each chunk but the first and the last, and the number of passes.

    A pass is counted by its call of a time embedding.
    """
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
