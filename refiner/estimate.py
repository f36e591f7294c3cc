"""Estimate the memory of a run before anything is loaded, and compare it with what is free."""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .memory.plan import MemoryPlan
from .wan.causal import CausalWan
from .wan.description import format_bytes
from .wan.fp8_linear import with_fp8
from .wan.transformer import WanConfig, WanTransformer

GB = 1e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a run takes on one device, by use, and `kv_host` besides."""

    weights: int  # of the transformer
    kv: int  # keys and values of the past and the current chunk
    text_kv: int  # cross-attention keys and values of the prompt
    activations: int  # of one pass over one chunk
    decode: int  # weights, state and activations of the VAE decoder
    refiner: int = 0  # its branches, or a merged copy of the weights that they change
    search: int = 0  # models of rewards, and judging a candidate
    text_encoder: int = 0  # its weights, freed before the transformer is loaded
    kv_host: int = 0  # K/V in host memory, where that is not the device's
    unconverted: int = 0  # weights before --fp8, on the same device and freed before sampling
    beside: bool = False  # whether chunks are decoded while others are sampled

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by use when most are taken.

        The text encoder is freed before the transformer is loaded, unconverted weights before
        sampling; a pass and the decoder take turns, unless the decoder works beside.
        """
        turns = {"activations": self.activations, "VAE decoder": self.decode}
        if not self.beside:
            turn = max(turns, key=turns.__getitem__)
            turns = {turn: turns[turn]}
        sampling = {
            "weights": self.weights,
            "refiner": self.refiner,
            "K/V": self.kv,
            "prompt K/V": self.text_kv,
            "rewards": self.search,
            **turns,
        }
        converting = {"weights": self.weights + self.unconverted, "refiner": self.refiner}
        encoding = {"text encoder": self.text_encoder}
        return max(sampling, converting, encoding, key=lambda uses: sum(uses.values()))

    def lines(self) -> str:
        """Format as an aligned table."""
        rows = {
            "transformer weights": self.weights,
            "refiner": self.refiner,
            "K/V memory": self.kv,
            "prompt K/V": self.text_kv,
            "activations of a pass": self.activations,
            "VAE decoder": self.decode,
            "rewards of a search": self.search,
            "text encoder, before all these": self.text_encoder,
            "at most at once": self.total,
        }
        if self.kv_host:
            rows["K/V in host memory, besides"] = self.kv_host
        return "\n".join(f"{name:<32}{size / GB:9.3f} GB" for name, size in rows.items())

    def check(self, available: int) -> None:
        """Raise ValueError, which says what to lower, when this exceeds `available` bytes.

        K/V in host memory are compared with what is free there.
        """
        self.check_host()
        if self.total > available:
            raise ValueError(
                f"this run takes about {self.total / GB:.1f} GB and {available / GB:.1f} GB are"
                f" free; {self.advice()}"
            )

    def check_host(self) -> None:
        """Raise ValueError when K/V in host memory exceed what is free there."""
        if self.kv_host:
            check_room(self.kv_host, "K/V in host memory", "lower --window, or use --store int8")

    def advice(self) -> str:
        """Name the largest share and how to lower it."""
        causes = {
            "K/V memory": (self.kv, "lower --window (or --size, --frames)"),
            "weights": (self.weights, "use a smaller model or --dtype bf16"),
            "refiner": (self.refiner, "use --refiner-form unmerged"),
            "activations": (self.activations, "lower --size"),
            "VAE decoder": (self.decode, "lower --size"),
            "search": (self.search, "use another method or --reward, or lower --size"),
            "text encoder": (
                self.text_encoder,
                "encode the prompt elsewhere and give --context or --context-cache",
            ),
        }
        name, (size, advice) = max(causes.items(), key=lambda cause: cause[1][0])
        return f"the largest share is the {name} with {format_bytes(size)}: {advice}"


def text_kv_bytes(config: WanConfig, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a prompt's cross-attention keys and values in every layer."""
    return 2 * config.num_layers * batch * tokens * config.dim * dtype.itemsize


def pass_bytes(config: WanConfig, plan: MemoryPlan, chunk: int, fp8: bool = False) -> int:
    """Approximate peak of a pass over `chunk` frames, in the feed-forward or in the attention."""
    tokens = plan.batch * chunk * plan.frame_tokens
    values = tokens * max(2 * config.ffn_dim + 12 * config.dim, 18 * config.dim)
    rotated = 0
    if plan.keys == "raw":
        rotated = plan.batch * plan.window_frames * plan.frame_tokens * config.dim
    # Raw keys are rotated in fp32: two tensors of 4 bytes a value, the keys and the result.
    queries = (chunk + plan.spare_frames) * plan.frame_tokens
    scratch = plan.policy.scratch_bytes(plan, queries)
    if fp8:  # the widest input divided by its scales, in fp32
        scratch += 4 * tokens * config.ffn_dim
    return values * plan.dtype.itemsize + 8 * rotated + plan.read_bytes + scratch


def parameter_count(config: WanConfig) -> int:
    """Count the parameters of a Wan2.1 transformer of these sizes."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in WanTransformer(config).parameters())


def weight_bytes(config: WanConfig, dtype: torch.dtype, fp8: bool = False) -> int:
    """Count the bytes of a transformer of these sizes, with `fp8` of a converted one."""
    with torch.device("meta"):
        network = CausalWan(WanTransformer(config).to(dtype), config)
    if fp8:
        network = with_fp8(network)
    return sum(parameter.nbytes for parameter in network.model.parameters())


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free now on a GPU, or that the kernel reports as available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "win32":
        return _windows_bytes()
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_room(nbytes: int, what: str, instead: str) -> None:
    """Raise ValueError, with the advice `instead`, when `what` exceeds the free CPU memory."""
    free = available_bytes(torch.device("cpu"))
    if nbytes > free:
        raise ValueError(
            f"{what} takes {nbytes / GB:.1f} GB and {free / GB:.1f} GB are free: {instead}"
        )


class MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("free", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _windows_bytes() -> int:
    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.free
