"""How much memory a run takes and how much there is: known before anything is loaded."""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .memory.plan import MemoryPlan
from .wan.transformer import WanConfig, WanTransformer

GB = 1e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a run on one device, by what takes them."""

    weights: int  # of the transformer
    kv: int  # keys and values of the past and the current chunk
    text_kv: int  # cross-attention keys and values of the prompt
    activations: int  # of one pass over one chunk
    decode: int  # weights, state and activations of the VAE decoder
    refiner: int = 0  # its branches, or a merged second copy of the weights that they change
    text_encoder: int = 0  # its weights, which are gone before the transformer's are loaded

    @property
    def total(self) -> int:
        """What is never alive at once does not add up: the larger counts."""
        return max(
            self.text_encoder,
            self.weights
            + self.refiner
            + self.kv
            + self.text_kv
            + max(self.activations, self.decode),
        )

    def lines(self) -> str:
        """An aligned table."""
        rows = {
            "transformer weights": self.weights,
            "refiner": self.refiner,
            "K/V memory": self.kv,
            "prompt K/V": self.text_kv,
            "activations of a pass": self.activations,
            "VAE decoder": self.decode,
            "text encoder, before all these": self.text_encoder,
            "at most at once": self.total,
        }
        return "\n".join(f"{name:<32}{size / GB:9.3f} GB" for name, size in rows.items())

    def check(self, available: int) -> None:
        """Raise ValueError, with the numbers and what to lower, when this does not fit in
        `available` bytes."""
        if self.total <= available:
            return
        causes = {
            "K/V memory": (self.kv, "lower --window (or --size, --frames)"),
            "weights": (self.weights, "use a smaller model or --dtype bf16"),
            "refiner": (self.refiner, "use --refiner-form unmerged"),
            "activations": (self.activations, "lower --size"),
            "VAE decoder": (self.decode, "lower --size"),
            "text encoder": (
                self.text_encoder,
                "encode the prompt elsewhere and give --context or --context-cache",
            ),
        }
        name, (size, lower) = max(causes.items(), key=lambda cause: cause[1][0])
        raise ValueError(
            f"this run takes about {self.total / GB:.1f} GB and {available / GB:.1f} GB are free; the most is the"
            f" {name} with {size / GB:.1f} GB: {lower}"
        )


def text_kv_bytes(config: WanConfig, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Of a prompt's cross-attention keys and values in every layer."""
    return 2 * config.num_layers * batch * tokens * config.dim * dtype.itemsize


def pass_bytes(config: WanConfig, plan: MemoryPlan, chunk: int) -> int:
    """About the most that is alive in a pass over `chunk` frames: in the feed-forward, or in the
    attention."""
    tokens = plan.batch * chunk * plan.frame_tokens
    values = tokens * max(2 * config.ffn_dim + 12 * config.dim, 18 * config.dim)
    turned = (
        plan.batch * plan.window_frames * plan.frame_tokens * config.dim
        if plan.keys == "raw"
        else 0
    )
    # Raw keys are rotated in fp32: they and the result.
    return values * plan.dtype.itemsize + 8 * turned + plan.read_bytes


def parameter_count(config: WanConfig) -> int:
    """Of a Wan2.1 transformer of these sizes."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in WanTransformer(config).parameters())


def available_bytes(device: torch.device) -> int:
    """Memory that is free now on the device (of a CPU: what the kernel says is available)."""
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
    """Raise ValueError, which says what to do instead, when something takes more of a CPU's memory
    than is free."""
    if nbytes > (free := available_bytes(torch.device("cpu"))):
        raise ValueError(
            f"{what} takes {nbytes / GB:.1f} GB and {free / GB:.1f} GB are free: {instead}"
        )


class MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("total", ctypes.c_uint64), ("free", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )  # fmt: skip


def _windows_bytes() -> int:
    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.free
