"""Queue many watched runs in a real ComfyUI and check that its memory stays flat.

    python tests/soak_campaign.py [--runs 200] [--growth 64]

Needs ComfyUI: COMFYUI_PATH, or ~/ComfyUI with its own .venv. Prints the server's resident memory
every 20 runs; fails if it grows by more than --growth MiB after the first quarter of the runs, in
which caches fill.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from comfy_server import Server, find_comfyui, install_pack
from comfy_watched import live_record, seconds_of, watched

from autorefiner.refiner.demo.bundle import WEIGHTS

EVERY = 20  # runs between two lines
WORKFLOW = "soak"


def soak(server: Server, runs: int, growth: int) -> bool:
    """Run it; return whether the memory stayed within `growth` bytes of that after the warm-up."""
    warm = max(1, runs // 4)
    base = largest = 0
    for done in range(1, runs + 1):
        seconds_of(server, watched(seed=done), WORKFLOW)
        record = live_record(server, WORKFLOW)
        if record["note"] or not record["fragments"]:
            raise RuntimeError(f"run {done} was not watched: {record['note']}")
        resident = server.resident_bytes()
        if done <= warm:
            base = resident
        largest = max(largest, resident if done > warm else 0)
        if done % EVERY == 0 or done == runs:
            print(f"{time.strftime('%H:%M:%S')} run {done:4} resident {resident >> 20} MiB")
    print(f"grew by {(largest - base) / (1 << 20):.1f} MiB after {warm} runs")
    return largest - base <= growth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--growth", type=int, default=64, help="MiB")
    args = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        print("no ComfyUI: set COMFYUI_PATH to a checkout", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        install_pack(base, WEIGHTS)
        server = Server.start(*comfyui, base)
        try:
            return 0 if soak(server, args.runs, args.growth << 20) else 1
        finally:
            server.stop()


if __name__ == "__main__":
    raise SystemExit(main())
