"""The section of `gpu.py` on compiled parts, CUDA graphs and fp8 products, one and together."""

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_sections import NO_FP8, SETTINGS, Kit, Models, Setting, chunk_seconds
from torch import Tensor

from autorefiner.refiner.acceleration import Acceleration
from autorefiner.refiner.noise.refiner import Refiner
from autorefiner.refiner.sample import sample
from autorefiner.refiner.wan.fp8_linear import multiplies_fp8, with_fp8

WAYS = {
    "plain": {},
    "compile": {"compile": True},
    "graphs": {"graphs": "auto"},
    "compile, graphs": {"compile": True, "graphs": "auto"},
}


@torch.no_grad()
def acceleration(kit: Kit) -> dict:
    """Time a chunk in a full window each way, and compare the last chunk's latents with plain's.

    Graphs are captured before the time is taken: each place of the ring has come round twice.
    """
    models, results = Models.of(kit), {}
    full, window, short, _ = SETTINGS
    forms = {"base": None, "pending, merged": models.refiners["pending, merged"]}
    for setting, form in ((window, "base"), (window, "pending, merged"), (short, "base")):
        results |= measured(kit, models, setting, form, forms[form], WAYS)
    both = {name: WAYS[name] for name in ("plain", "compile, graphs")}
    results |= measured(kit, models, full, "base", None, both)
    if not multiplies_fp8(kit.device):
        return results | {"fp8": {"skipped": NO_FP8}}
    converted = Models(with_fp8(models.base), {}, models.context)
    for form, refiner in forms.items():
        active = refiner and replace(refiner, network=with_fp8(refiner.network))
        results |= measured(kit, converted, window, f"{form}, fp8", active, both)
    return results


def measured(
    kit: Kit,
    models: Models,
    setting: Setting,
    form: str,
    refiner: Refiner | None,
    ways: dict[str, dict],
) -> dict:
    """Measure a setting and form in several ways, the plain one first."""
    results, expected = {}, None
    for name, options in ways.items():
        figures, latents = accelerated(kit, models, setting, refiner, Acceleration(**options))
        if expected is None:
            expected = latents
        figures["difference"] = float((latents - expected).norm() / expected.norm())
        results[f"{setting.name}: {form}, {name}"] = figures
    return results


def accelerated(
    kit: Kit,
    models: Models,
    setting: Setting,
    refiner: Refiner | None,
    acceleration: Acceleration,
) -> tuple[dict, Tensor]:
    """Time steady chunks; return the figures, and the last chunk's latents."""
    kit.peak()
    rounds = -(-(setting.window - setting.sink) // setting.chunk)
    warm = setting.filling_chunks + 2 * rounds
    plan = setting.plan(kit, warm + kit.steady_chunks + 1)  # the last is not committed
    latents: list[Tensor] = []
    with acceleration.attached(models.base, refiner, kit.device) as (network, refined):
        chunks = sample(network, models.context, plan, refiner=refined)
        seconds = chunk_seconds(kept_last(chunks, latents), kit.device)
    steady = statistics.median(seconds[warm:-1])
    compiler = acceleration.compiler
    figures = {
        "chunk_ms": 1e3 * steady,
        "frames_per_second": 4 * setting.chunk * setting.batch / steady,
        "compile_s": compiler.seconds,
        "peak_gb": kit.peak(),
    }
    if compiler.failure:
        figures["failure"] = compiler.failure[:200]
    return figures, latents[-1].float()


def kept_last(chunks: Iterator[Tensor], latents: list[Tensor]) -> Iterator[Tensor]:
    """Pass chunks on; hold the last."""
    for x0 in chunks:
        latents[:] = [x0]
        yield x0
