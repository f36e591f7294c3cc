"""Measure memory and time per chunk while a tiny model streams an endless video to a file.

    python benchmarks/long_video.py [--memory NAME[:KNOB=VALUE,…]] [--chunks 300]
    python benchmarks/long_video.py --all

The model has random weights and two noise levels. The run of `window` also decodes every chunk and
writes it to a file, as `autorefiner generate --frames endless` does; that part is the same for
every memory. `--all` takes every memory: 3,000 chunks of `window` and `ema-sink`, 300 of the
others. The first tenth of the chunks warms up. A run is flat if from then on the process grows by
less than 8 MB, and the last tenth of its chunks takes less than 1.3 times as long as the first one.
The time of a tenth is the CPU time that one in ten of its chunks beats, which other processes
disturb least.
"""

import argparse
import gc
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from autorefiner.refiner.bench import random_model
from autorefiner.refiner.choices import choose
from autorefiner.refiner.memory.policies import POLICIES
from autorefiner.refiner.run_plan import RunPlan, suggested
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.video import VideoWriter, to_frames
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.transformer import WanConfig
from autorefiner.refiner.wan.vae import DecoderState, WanVAE

CONFIG = WanConfig(dim=64, num_heads=2, ffn_dim=64, num_layers=2, text_dim=16, text_len=8)
SIDE = 4  # of the latents
LONG, SHORT = 3000, 300  # chunks
LONG_RUNS = ("window", "ema-sink")
LEVELS = (1000, 500)
GROWTH, SLOWDOWN = 8e6, 1.3  # bytes and factor of a run that is not flat


def resident() -> float:
    """Return the resident bytes of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@dataclass(frozen=True, slots=True)
class Figures:
    """Measurements of one run, after its warm-up."""

    memory: str
    chunks: int
    memory_bytes: int  # keys and values
    start_bytes: float  # of the process
    end_bytes: float
    first_ms: float  # CPU time of a chunk in the first tenth
    last_ms: float

    @property
    def is_flat(self) -> bool:
        """Whether neither memory nor time grew."""
        grows = self.end_bytes - self.start_bytes > GROWTH
        return not grows and self.last_ms < SLOWDOWN * self.first_ms

    def row(self) -> str:
        """Format as a row of the table."""
        start, end = self.start_bytes / 1e6, self.end_bytes / 1e6
        return (
            f"{self.memory:<24}{self.chunks:7,}{self.memory_bytes / 1e3:10.1f}{start:10.1f}"
            f"{end:10.1f}{self.first_ms:10.2f}{self.last_ms:10.2f}"
            f"  {'flat' if self.is_flat else 'grows'}"
        )


HEADER = (
    f"{'memory':<24}{'chunks':>7}{'K/V kB':>10}{'start MB':>10}{'end MB':>10}{'first ms':>10}"
    f"{'last ms':>10}"
)


def sampled(plan: RunPlan) -> Iterator[Tensor]:
    """Sample with random weights."""
    torch.manual_seed(0)
    network = CausalWan(random_model(CONFIG, torch.device("cpu"), torch.float32), CONFIG)
    return sample(network, torch.randn(1, CONFIG.text_len, CONFIG.text_dim), plan)


def written(chunks: Iterator[Tensor], path: Path) -> Iterator[Tensor]:
    """Decode each chunk and write it before passing it on."""
    vae, state = WanVAE(4).requires_grad_(False), DecoderState()
    with VideoWriter(path, 8 * SIDE, 8 * SIDE, indexed=False) as video:
        for x0 in chunks:
            video.write(to_frames(vae.decode(x0, state)))
            yield x0


def fast(times: list[float]) -> float:
    """Return the time that one in ten beats."""
    return sorted(times)[len(times) // 10]


@torch.no_grad()
def measure(memory: str, chunks: int, window: int, sink: int, path: Path) -> Figures:
    """Stream so many chunks with a memory."""
    policy = choose(memory, POLICIES, "memory")
    preset = suggested(PRESETS["self-forcing"].changed(levels=LEVELS), policy)
    if preset.window < 0:
        preset = preset.changed(window=window, sink=sink)
    plan = RunPlan(preset, None, SIDE, SIDE, policy=policy)
    warm_up, tenth = chunks // 10, max(1, chunks // 10)
    stream, times = sampled(plan), []
    if memory == "window":
        stream = written(stream, path)
    for _ in islice(stream, warm_up):
        pass
    start = resident()
    for _ in range(chunks - warm_up):
        began = time.process_time()
        next(stream)
        times.append(1e3 * (time.process_time() - began))
    end = resident()
    stream.close()
    nbytes = plan.memory_bytes(CONFIG, torch.float32)
    return Figures(memory, chunks, nbytes, start, end, fast(times[:tenth]), fast(times[-tenth:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = f"one of {', '.join(POLICIES)} (default window)"
    parser.add_argument("--memory", default="window", metavar="NAME[:KNOB=VALUE,…]", help=about)
    parser.add_argument("--all", action="store_true", help="every memory")
    about = f"default {LONG:,} for {' and '.join(LONG_RUNS)}, {SHORT} for others"
    parser.add_argument("--chunks", type=int, metavar="N", help=about)
    parser.add_argument("--window", type=int, default=9, help="where the memory suggests none")
    parser.add_argument("--sink", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(HEADER)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for memory in POLICIES if args.all else [args.memory]:
            chunks = args.chunks or (LONG if memory in LONG_RUNS else SHORT)
            path = Path(folder) / "long.mp4"
            figures.append(measure(memory, chunks, args.window, args.sink, path))
            print(figures[-1].row(), flush=True)
    if grown := [each.memory for each in figures if not each.is_flat]:
        raise SystemExit(f"not flat: {', '.join(grown)}")


if __name__ == "__main__":
    main()
