"""Measure the speed and memory of sampling with random weights of a published size."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None

from .acceleration import Acceleration
from .choices import choose
from .estimate import Estimate, available_bytes, parameter_count, pass_bytes, text_kv_bytes
from .memory.policies import POLICIES
from .memory.stores import get_store
from .noise.source import WhiteNoise
from .rollout import Progress, Rollout
from .run_plan import RunPlan, suggested
from .samplers import self_forcing
from .schedule import PRESETS
from .wan.causal import CausalWan
from .wan.linear import Linear
from .wan.transformer import WAN_1_3B, WAN_14B, WAN_TINY, WanConfig, WanTransformer
from .wan.vae import DecoderState, WanVAE


@dataclass(frozen=True, slots=True)
class BenchSize:
    """A model size and the clip that it is measured on."""

    config: WanConfig
    height: int  # latent
    width: int  # latent
    vae_dim: int  # base width of the VAE


SIZES = {
    "tiny": BenchSize(WAN_TINY, 16, 16, 8),
    "1.3b": BenchSize(WAN_1_3B, 60, 104, 96),
    "14b": BenchSize(WAN_14B, 60, 104, 96),
}


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Figures of one run; times are medians over all chunks but the first."""

    size: str
    device: str
    dtype: str
    threads: int
    chunks: int
    pass_ms: float  # one denoise pass
    chunk_ms: float  # all passes of a chunk, commit included
    dit_fps: float  # pixel frames a second of the transformer alone
    decode_fps: float  # pixel frames a second of the VAE alone
    peak_bytes: int  # of the device, or of the process on a CPU
    kv_bytes: int  # on the device
    kv_host_bytes: int  # in host memory, where that is not the device's
    pass_gflop: float  # arithmetic of one denoise pass over the last chunk
    matmul_gflops: float  # of a large matrix product with our Linear, in this run
    torch_matmul_gflops: float  # the same product through torch.nn.functional.linear
    peak_share: float  # speed of the denoise pass over that of the faster product
    compile_s: float = 0.0

    def table(self) -> str:
        """Format as an aligned table, one figure a line."""
        head = (
            f"{self.size}, {self.device}, {self.dtype}, {self.threads} threads,"
            f" {self.chunks} chunks"
        )
        fps = 1 / (1 / self.dit_fps + 1 / self.decode_fps)
        product = f"{self.matmul_gflops:.0f} GFLOP/s"
        torch_product = f"{self.torch_matmul_gflops:.0f}"
        rows = [
            ("a denoise pass", f"{self.pass_ms:.1f} ms"),
            ("a chunk", f"{self.chunk_ms:.1f} ms"),
            ("DiT alone", f"{self.dit_fps:.2f} frames/s"),
            ("decoding alone", f"{self.decode_fps:.2f} frames/s"),
            ("both", f"{fps:.2f} frames/s"),
            ("peak memory", f"{self.peak_bytes / 1e9:.3f} GB"),
            ("K/V memory", f"{self.kv_bytes / 1e9:.4f} GB"),
            ("arithmetic of a pass", f"{self.pass_gflop:.1f} GFLOP"),
            ("matrix product", f"{product} (torch's linear: {torch_product})"),
            ("share of it", f"{100 * self.peak_share:.0f} %"),
        ]
        if self.compile_s:
            rows.append(("compiling", f"{self.compile_s:.1f} s"))
        if self.kv_host_bytes:
            rows.append(("K/V in host memory", f"{self.kv_host_bytes / 1e9:.4f} GB"))
        return "\n".join([head, *(f"  {name:<22}{value:>14}" for name, value in rows)])


def pass_flops(config: WanConfig, tokens: int, keys: int, text_tokens: int) -> float:
    """Count multiplications and additions of a pass: projections, both attentions, feed-forward."""
    projections = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    attention = 2 * config.dim * (keys + text_tokens)
    return 2 * config.num_layers * tokens * (projections + attention)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `run` takes, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def matmul_gflops(
    linear: Callable[[Tensor], Tensor], side: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Return the best speed of five products of square matrices, large enough to hide launches."""
    x = torch.randn(side, side, device=device, dtype=dtype)
    linear(x)
    seconds = min(clock(lambda: linear(x), device) for _ in range(5))
    return 2 * side**3 / seconds / 1e9


def random_model(config: WanConfig, device: torch.device, dtype: torch.dtype) -> WanTransformer:
    """Draw random weights on the device in the dtype of use, so nothing larger is allocated."""
    with torch.device("meta"):
        model = WanTransformer(config).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    return model


def bench(
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    chunks: int,
    window: int | None = None,
    store: str = "plain",
    memory: str = "window",
    acceleration: Acceleration | None = None,
) -> BenchReport:
    """Sample and decode `chunks` chunks of 3 latent frames; see BenchReport.

    Raises ValueError for fewer than 2 chunks, and before anything is loaded when the model does not
    fit into memory.
    """
    if chunks < 2:
        raise ValueError(f"{chunks} chunks: give at least 2, the first one warms up")
    acceleration = acceleration or Acceleration()
    case, config = SIZES[size], SIZES[size].config
    run = plan_bench(case, chunks, window, store, memory)
    preset, plan = run.preset, run.memory(config, dtype)
    kv, kv_host = plan.bytes_on(device)
    estimate_bytes(case, run, dtype, device).check(available_bytes(device))
    with torch.no_grad():
        network = CausalWan(random_model(config, device, dtype), config)
        context = torch.randn(1, config.text_len, config.text_dim, device=device, dtype=dtype)
        with acceleration.attached(network, None, device) as (network, _):
            rollout = Rollout.of(network, context, run, WhiteNoise(0))
            pass_times, chunk_times, latents = measure_sampling(rollout, device)
        vae = WanVAE(case.vae_dim).to(device, dtype).requires_grad_(False)
        decode_fps = measure_decode(vae, latents, device)
        matmul, torch_matmul = measure_matmul(device, dtype)

    pass_seconds, chunk_seconds = statistics.median(pass_times), statistics.median(chunk_times)
    tokens, keys = preset.chunk * plan.frame_tokens, plan.window_frames * plan.frame_tokens
    flops = pass_flops(config, tokens, keys, config.text_len)
    return BenchReport(
        size=size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        chunks=chunks,
        pass_ms=1e3 * pass_seconds,
        chunk_ms=1e3 * chunk_seconds,
        dit_fps=4 * preset.chunk / chunk_seconds,
        decode_fps=decode_fps,
        peak_bytes=peak_bytes(device),
        kv_bytes=kv,
        kv_host_bytes=kv_host,
        pass_gflop=flops / 1e9,
        matmul_gflops=matmul,
        torch_matmul_gflops=torch_matmul,
        peak_share=flops / pass_times[-1] / 1e9 / max(matmul, torch_matmul),
        compile_s=acceleration.compiler.seconds,
    )


def plan_bench(
    case: BenchSize, chunks: int, window: int | None, store: str, memory: str
) -> RunPlan:
    """Plan a measured run; without a window, that of the memory policy, or full history."""
    policy = choose(memory, POLICIES, "memory")
    preset = suggested(PRESETS["self-forcing"], policy).changed(window=window)
    frames, stored = preset.chunk * chunks, get_store(store)
    return RunPlan(preset, frames, case.height, case.width, policy=policy, store=stored)


def estimate_bytes(
    case: BenchSize, run: RunPlan, dtype: torch.dtype, device: torch.device
) -> Estimate:
    """Estimate the memory of a measured run."""
    config, chunk = case.config, run.preset.chunk
    plan = run.memory(config, dtype)
    pixels = 8 * case.height, 8 * case.width
    kv, kv_host = plan.bytes_on(device)
    return Estimate(
        weights=parameter_count(config) * dtype.itemsize,
        kv=kv,
        kv_host=kv_host,
        text_kv=text_kv_bytes(config, 1, config.text_len, dtype),
        activations=pass_bytes(config, plan, chunk),
        decode=WanVAE.decode_bytes(case.vae_dim, *pixels, chunk, dtype),
    )


def measure_matmul(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return GFLOP/s of a large matrix product, through our Linear and through torch's."""
    side = 8192 if device.type == "cuda" else 2048
    layer = Linear(side, side, device=device, dtype=dtype)
    ours = matmul_gflops(layer, side, device, dtype)
    theirs = matmul_gflops(lambda x: F.linear(x, layer.weight, layer.bias), side, device, dtype)
    return ours, theirs


def measure_sampling(
    rollout: Rollout, device: torch.device
) -> tuple[list[float], list[float], list[Tensor]]:
    """Return seconds of denoise passes, seconds of chunks (without the first), and latents.

    A pass counts with its renoising.
    """
    marks: list[tuple[int, float]] = []

    def mark(progress: Progress) -> None:
        synchronize(device)
        marks.append((progress.chunk.index, time.perf_counter()))

    rollout.callback = mark
    latents, ends = [], []
    for x0 in self_forcing().run(rollout):
        synchronize(device)
        ends.append(time.perf_counter())
        latents.append(x0)
    passes = [late - early for (i, early), (j, late) in pairwise(marks) if i == j > 0]
    chunks = [late - early for early, late in pairwise(ends)]
    return passes, chunks[:-1] or chunks, latents  # the last chunk is not committed


def measure_decode(vae: WanVAE, latents: list[Tensor], device: torch.device) -> float:
    """Return pixel frames a second of the streaming decoder over all chunks but the first."""
    state, dtype = DecoderState(), next(vae.parameters()).dtype
    vae.decode(latents[0].to(dtype), state)
    seconds = [clock(lambda x0=x0: vae.decode(x0.to(dtype), state), device) for x0 in latents[1:]]
    return 4 * latents[1].shape[2] / statistics.median(seconds)


def peak_bytes(device: torch.device) -> int:
    """Return the device's peak allocation; on a CPU the process's peak resident size.

    0 on Windows, which does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
