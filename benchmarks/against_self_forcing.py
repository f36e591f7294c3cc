"""Compare this pack with the public Self-Forcing pipeline and with ComfyUI's SamplerARVideo.

    python benchmarks/against_self_forcing.py --self-forcing FOLDER --comfyui FOLDER
    python benchmarks/against_self_forcing.py --device cpu --size rehearsal …

One process, one device, the same random weights and prompt. FOLDER is a checkout of
guandeh17/Self-Forcing and one of ComfyUI. THEIR CODE IS EXECUTED as yours: name only folders that
you trust. Self-Forcing needs nothing besides torch and einops; for ComfyUI, run this with ComfyUI's
interpreter. contender_self_forcing.py says what is replaced there, and why: flash_attn by torch's
scaled_dot_product_attention above all. An implementation that is not named, or cannot run, has a
row with the reason.

Chunks have 3 latent frames (12 pixel frames), see 21, and take four denoise passes and one that
writes their K/V; every pass counts, and so does all between them. Times are medians, after a whole
clip that warms up. Before, each implementation denoises one chunk behind a chunk of the past, both
given; the relative difference of its x0 from this pack's should be within 2e-2 in bf16, 2e-4 in
fp32. Peak memory is of the GPU while sampling, weights included; decoding is left out. The
implementations run one after the other, so other load on the machine spoils the comparison.

Prints one table; writes DATE-CARD-against.json beside the results of gpu.py.
"""

import argparse
import gc
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import gpu  # makes this checkout importable
import torch
from contender import CHUNK, PRESET, WINDOW, Contender, Job, autorefiner
from contender_self_forcing import self_forcing
from gpu_sections import SIZES, Kit, card
from torch import Tensor

sys.path.insert(0, str(gpu.ROOT / "tests"))

from golden_cases import relative_distance

LIMITS = {torch.bfloat16: 2e-2, torch.float32: 2e-4}
COLUMNS = {
    "pass_ms": "ms a pass",
    "write_ms": "ms a write",
    "chunk_ms": "ms a chunk",
    "frames_per_second": "frames/s",
    "peak_gb": "peak GB",
    "difference": "difference",
}
NAMES = {
    "autorefiner": "this pack",
    "self_forcing": "Self-Forcing, public code",
    "comfyui": "ComfyUI, SamplerARVideo",
}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--self-forcing", type=Path, metavar="FOLDER")
    add("--comfyui", type=Path, metavar="FOLDER")
    add("--device", default="cuda")
    add("--size", choices=SIZES, default="1.3b")
    add("--steady-chunks", type=int, default=4, help="chunks to time")
    add("--out", type=Path, default=gpu.ROOT / "benchmarks" / "results")
    return parser.parse_args()


def comfyui(folder: Path, job: Job) -> Contender:
    """Load ComfyUI, whose import changes the process: only where it is named."""
    from contender_comfyui import comfyui

    return comfyui(folder, job)


def loaders(args: argparse.Namespace) -> dict[str, Callable[[Job], Contender] | None]:
    """Return how to load each implementation; None where no folder is named."""
    ours: dict[str, Callable[[Job], Contender] | None] = {"autorefiner": autorefiner}
    for name, load in (("self_forcing", self_forcing), ("comfyui", comfyui)):
        folder = getattr(args, name)
        ours[name] = folder and (lambda job, load=load, folder=folder: load(folder, job))
    return ours


def measure(
    load: Callable[[Job], Contender], job: Job, ours: Tensor | None
) -> tuple[dict, Tensor | None]:
    """Return a row, and the x0 of the compared chunk; whatever goes wrong is the row's reason.

    `ours` is this pack's x0; None where this pack is measured.
    """
    try:
        contender = load(job)
        x0 = contender.second_chunk().float().cpu()
        row = agreement(x0, ours, LIMITS[job.kit.dtype]) if ours is not None else {}
        return {**contender.figures(job.kit), **row, "note": contender.note}, x0
    except Exception as error:  # others' code raises anything
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        return {"reason": f"{type(error).__name__}: {lines[0][:160]}"}, None


def agreement(x0: Tensor, ours: Tensor, limit: float) -> dict:
    """Return how far an x0 is from this pack's, and whether that is within the limit."""
    difference = relative_distance(x0, ours)
    return {"difference": difference, "limit": limit, "agrees": difference <= limit}


def revision(folder: Path | None) -> str | None:
    """Return a checkout's commit, if it has one."""
    if folder is None:
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None


def run(args: argparse.Namespace, kit: Kit) -> dict:
    """Measure all implementations, one loaded at a time."""
    job, ours = Job(kit), None
    results = {"card": card(kit), "setting": setting(kit)}
    for name, load in loaders(args).items():
        if load is None:
            option = f"--{name.replace('_', '-')}"
            results[name] = {"reason": f"not named: give {option} FOLDER"}
            continue
        results[name], x0 = measure(load, job, ours)
        if name in args:
            results[name]["revision"] = revision(getattr(args, name))
        ours = x0 if name == "autorefiner" else ours
        gc.collect()
        if kit.device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def setting(kit: Kit) -> dict:
    """Say what is run."""
    return {
        "size": kit.size,
        "pixels": f"{8 * kit.case.width}×{8 * kit.case.height}",
        "dtype": str(kit.dtype).removeprefix("torch."),
        "chunk_frames": CHUNK,
        "visible_frames": WINDOW,
        "levels": list(PRESET.levels),
    }


def table(results: dict) -> str:
    """Format one row an implementation."""
    setting, device = results["setting"], results["card"]["device"]
    lines = [
        f"{setting['size']}, {setting['pixels']}, {setting['dtype']}, {device};"
        f" chunks of {setting['chunk_frames']} latent frames that see {setting['visible_frames']}",
        f"{'':<26}" + "".join(f"{title:>12}" for title in COLUMNS.values()),
    ]
    for name, title in NAMES.items():
        row = results[name]
        lines.append(f"{title:<26}" + (shown(row) if "chunk_ms" in row else f"  {row['reason']}"))
    return "\n".join(lines)


def shown(row: dict) -> str:
    """Format the figures of an implementation that ran."""
    figures = [gpu.shown_figure(row[name]) if name in row else "–" for name in COLUMNS]
    exceeds = "" if row.get("agrees", True) else f"EXCEEDS {row['limit']:g}  "
    return "".join(f"{figure:>12}" for figure in figures) + f"  {exceeds}{row['note']}".rstrip()


def failed(results: dict, args: argparse.Namespace) -> bool:
    """Tell whether an implementation that is named did not run, or differs."""
    rows = [results[name] for name, load in loaders(args).items() if load]
    return any("reason" in row or not row.get("agrees", True) for row in rows)


def main() -> int:
    """Compare, print and write."""
    args = arguments()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kit = Kit(device, args.size, dtype=dtype, steady_chunks=args.steady_chunks)
    results = run(args, kit)
    path = gpu.result_path(args.out, kit)
    path = path.with_name(f"{path.stem}-against.json")
    gpu.write(path, results)
    print(table(results))
    print(path)
    return 1 if failed(results, args) else 0


if __name__ == "__main__":
    sys.exit(main())
