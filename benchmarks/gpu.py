"""Check and measure everything that needs a GPU, section by section.

    python benchmarks/gpu.py [--sections NAME …] [--minutes 8] [--out FOLDER]
    python benchmarks/gpu.py --device cpu --size rehearsal --large rehearsal

Writes one JSON (DATE-CARD.json) and prints one table. A section that the JSON has already is not
run again, so a run that was stopped goes on; `--again` measures anew. No section begins once
`--minutes` are over. Needs torch and the package's dependencies, no network.
"""

import argparse
import json
import sys
import time
import traceback
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def import_package() -> None:
    """Import this checkout as `autorefiner` where it is not installed."""
    try:
        import autorefiner  # noqa: F401
    except ImportError:
        import importlib.util

        spec = importlib.util.spec_from_file_location(
            "autorefiner", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["autorefiner"] = module
        spec.loader.exec_module(module)


import_package()

from gpu_acceleration import acceleration  # noqa: E402
from gpu_attention import attention  # noqa: E402
from gpu_decoding import compiled_decoding, decoding, fragmentation  # noqa: E402
from gpu_non_finite import non_finite  # noqa: E402
from gpu_sections import SECTIONS as OTHER_SECTIONS  # noqa: E402
from gpu_sections import SIZES, Kit  # noqa: E402
from gpu_stores import stores  # noqa: E402

SECTIONS = {
    **OTHER_SECTIONS,
    "non_finite": non_finite,
    "attention": attention,
    "stores": stores,
    "decoding": decoding,
    "fragmentation": fragmentation,
    # last, so compiling delays no other
    "acceleration": acceleration,
    "compiled_decoding": compiled_decoding,
}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    add("--device", default="cuda")
    add("--size", choices=SIZES, default="1.3b")
    add("--large", choices=SIZES, default="14b")
    add("--steady-chunks", type=int, default=4)
    add("--minutes", type=float, default=8.0)
    add("--out", type=Path, default=ROOT / "benchmarks" / "results")
    add("--again", action="store_true")
    return parser.parse_args()


def result_path(folder: Path, kit: Kit) -> Path:
    """Name the file by date and card."""
    name = torch.cuda.get_device_name(kit.device) if kit.device.type == "cuda" else "cpu"
    card = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    size = "" if kit.size == "1.3b" else f"-{kit.size}"
    return folder / f"{date.today().isoformat()}-{card}{size}.json"


def read(path: Path) -> dict:
    """Read the sections that are there."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: dict) -> None:
    """Write all sections, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def measure(kit: Kit, section: str) -> dict:
    """Run a section; an error becomes its result, so that the next one still runs."""
    began = time.perf_counter()
    try:
        result = SECTIONS[section](kit)
    except (RuntimeError, ValueError, AssertionError) as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    if kit.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"seconds": round(time.perf_counter() - began, 1), "result": result}


def table(results: dict) -> str:
    """Format all sections, one figure a line; those that did not run are not measured."""
    lines = []
    for section in SECTIONS:
        if section not in results:
            lines.append(f"{section}: not measured")
            continue
        lines.append(f"{section} ({results[section]['seconds']} s)")
        lines += rows(results[section]["result"])
    return "\n".join(lines)


def rows(result: dict, indent: str = "  ") -> list[str]:
    """Format the figures of a section, those that belong together on one line."""
    lines = []
    for name, value in result.items():
        shown = shown_figures(value) if isinstance(value, dict) else shown_figure(value)
        lines.append(f"{indent}{name:<36} {shown}")
    return lines


def shown_figures(figures: dict) -> str:
    """Format named figures on one line."""
    return "   ".join(f"{name} {shown_figure(value)}" for name, value in figures.items())


def shown_figure(value: object) -> str:
    """Format a figure with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run what is missing."""
    args = arguments()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kit = Kit(device, args.size, args.large, dtype, args.steady_chunks)
    path, ends = result_path(args.out, kit), time.monotonic() + 60 * args.minutes
    results = {} if args.again else read(path)
    for section in args.sections:
        if section in results:
            continue
        if time.monotonic() > ends:
            print(f"{section}: no time left", flush=True)
            continue
        torch.manual_seed(0)
        results[section] = measure(kit, section)
        write(path, results)
        print(f"{section}: {results[section]['seconds']} s", flush=True)
    print(table(results))
    print(path)
    failed = [name for name, each in results.items() if "error" in each["result"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
