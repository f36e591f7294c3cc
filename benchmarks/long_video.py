"""Measure the resident size while a tiny model streams a long video to a file.

    python benchmarks/long_video.py [--frames 2001] [--window 9] [--out FOLDER]

Prints the process's resident size every 100 latent frames, and its growth after the first hundred:
memory does not grow with length.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from autorefiner.refiner.bench import random_model
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.video import VideoWriter, to_frames
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.transformer import WanConfig
from autorefiner.refiner.wan.vae import DecoderState, WanVAE

CONFIG = WanConfig(dim=128, num_heads=1, ffn_dim=256, num_layers=2, text_dim=64, text_len=16)


def resident() -> float:
    """Return the resident size of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=2001, help="latent frames")
    parser.add_argument("--window", type=int, default=9)
    parser.add_argument("--sink", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()

    torch.manual_seed(0)
    network = CausalWan(random_model(CONFIG, torch.device("cpu"), torch.float32), CONFIG)
    vae, state = WanVAE(8).requires_grad_(False), DecoderState()
    preset = PRESETS["self-forcing"].changed(window=args.window, sink=args.sink)
    plan = RunPlan(preset, args.frames, 8, 8)
    context = torch.randn(1, CONFIG.text_len, CONFIG.text_dim)
    path, done, sizes, start = args.out / "long_video.mp4", 0, {}, time.perf_counter()
    with (
        VideoWriter(path, 64, 64, metadata={"prompt": "memory benchmark"}) as video,
        torch.no_grad(),
    ):
        for x0 in sample(network, context, plan):
            video.write(to_frames(vae.decode(x0, state)))
            done += x0.shape[2]
            if done % 100 < preset.chunk or done == args.frames:
                sizes[done], seconds = resident(), time.perf_counter() - start
                figures = f"{sizes[done]:9.1f} MB {seconds:7.1f} s"
                print(f"{done:6d} latent frames {figures}", flush=True)
    first, *later = sizes.values()
    written = path.stat().st_size / 1e6
    growth = max(later) - first
    print(f"growth after the first hundred: {growth:+.1f} MB; {path} {written:.1f} MB")


if __name__ == "__main__":
    main()
