"""How much memory a run takes and how much there is: known before anything is loaded."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .memory.plan import MemoryPlan
from .wan.transformer import WanConfig

GB = 1e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a run on one device, by what takes them."""

    weights: int  # of the transformer
    kv: int  # keys and values of the past and the current chunk
    text_kv: int  # cross-attention keys and values of the prompt
    activations: int  # of one pass over one chunk
    decode: int  # weights, state and activations of the VAE decoder

    @property
    def total(self) -> int:
        """The network's pass and the decoder's do not run at once, so the larger of the two counts."""
        return self.weights + self.kv + self.text_kv + max(self.activations, self.decode)

    def lines(self) -> str:
        """An aligned table."""
        rows = {
            "transformer weights": self.weights,
            "K/V memory": self.kv,
            "prompt K/V": self.text_kv,
            "activations of a pass": self.activations,
            "VAE decoder": self.decode,
            "together (the larger of the last two)": self.total,
        }
        return "\n".join(f"{name:<38}{size / GB:9.3f} GB" for name, size in rows.items())

    def check(self, available: int) -> None:
        """Raise ValueError, with the numbers and what to lower, when this does not fit in `available` bytes."""
        if self.total <= available:
            return
        largest = max(("kv", "weights", "activations", "decode"), key=lambda name: getattr(self, name))
        lower = {
            "kv": "lower --window (or --size, --frames)",
            "weights": "use a smaller model or --dtype bf16",
            "activations": "lower --size",
            "decode": "lower --size",
        }[largest]
        raise ValueError(
            f"this run takes about {self.total / GB:.1f} GB and {available / GB:.1f} GB are free; the most is"
            f" {largest} with {getattr(self, largest) / GB:.1f} GB: {lower}"
        )


def text_kv_bytes(config: WanConfig, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Of a prompt's cross-attention keys and values in every layer."""
    return 2 * config.num_layers * batch * tokens * config.dim * dtype.itemsize


def pass_bytes(config: WanConfig, plan: MemoryPlan, chunk: int) -> int:
    """Most that is alive at once in a pass over `chunk` frames: the feed-forward's two, or the attention's seven."""
    tokens = plan.batch * chunk * plan.frame_tokens
    return tokens * max(2 * config.ffn_dim + 3 * config.dim, 7 * config.dim) * plan.dtype.itemsize


def parameter_count(config: WanConfig) -> int:
    """Of a Wan2.1 transformer of these sizes."""
    from .wan.transformer import WanTransformer

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in WanTransformer(config).parameters())


def available_bytes(device: torch.device) -> int:
    """Memory that is free now on the device (of a CPU: what the kernel says is available)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
