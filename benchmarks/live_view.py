"""Measure what watching a run costs in a real ComfyUI: python benchmarks/live_view.py

    COMFYUI_PATH=~/ComfyUI python benchmarks/live_view.py [--side 64] [--length 161] [--runs 5]

Samples the demo alone, with VAE Decode Chunks after it, and watched: the chunks are decoded while
the run goes on. The three take turns on one server. Prints the time to the first picture and of the
whole run (medians), frames a second, and the server's memory before and after.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from comfy_server import Server, find_comfyui, install_pack  # noqa: E402
from comfy_watched import live_record, seconds_of, watched  # noqa: E402

from autorefiner.refiner.demo.bundle import WEIGHTS  # noqa: E402

KINDS = {  # options of `watched`
    "sampled": {"live": False},
    "sampled, then decoded": {"live": False, "decode": True},
    "watched": {"live": True},
}


def measure(server: Server, side: int, length: int, runs: int) -> None:
    first: list[float] = []
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for run in range(runs + 1):  # the first one warms up
        for number, (kind, options) in enumerate(KINDS.items()):
            seed = run * len(KINDS) + number  # of its own: chunks of an earlier run are reused
            total = seconds_of(server, watched(seed, length, side, **options), "bench")
            if run:
                seconds[kind].append(total)
            if run and kind == "watched":
                first.append(live_record(server, "bench")["first"])
        if run == 0:
            before = server.resident_bytes()
    after = server.resident_bytes()
    pictures = {kind: statistics.median(times) for kind, times in seconds.items()}
    pictures["watched"] = statistics.median(first)
    print(f"{length} frames of {side}x{side}, medians of {runs} runs\n")
    print("| run | first picture | whole run | frames/s |\n|---|---|---|---|")
    for kind, times in seconds.items():
        total = statistics.median(times)
        shown = "none" if kind == "sampled" else f"{pictures[kind]:.2f} s"
        print(f"| {kind} | {shown} | {total:.2f} s | {length / total:.1f} |")
    one, other = (statistics.median(seconds[kind]) for kind in list(KINDS)[1:])
    print(f"\nwatched against sampled, then decoded: {100 * (other / one - 1):+.1f} %")
    print(f"server memory: {before >> 20} MiB after the first runs, {after >> 20} MiB at the end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--length", type=int, default=161)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("no ComfyUI: set COMFYUI_PATH to a checkout")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        install_pack(base, WEIGHTS)
        server = Server.start(*comfyui, base)
        try:
            measure(server, args.side, args.length, args.runs)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
