"""The section of `gpu.py` on the stores of the memory."""

import statistics
from dataclasses import replace

import torch
from gpu_sections import SETTINGS, Kit, Models, chunk_seconds

from autorefiner.refiner.memory.stores import STORES
from autorefiner.refiner.sample import sample


@torch.no_grad()
def stores(kit: Kit) -> dict:
    """Time chunks with each store; state how far its latents are from those of the plain one."""
    models, setting, results, plain = Models.of(kit), SETTINGS[1], {}, None
    chunks = setting.filling_chunks + kit.steady_chunks + 1  # the last is not committed
    for name, store in STORES.items():
        kit.peak()
        plan = replace(setting.plan(kit, chunks), store=store)
        latents = []
        run = (latents.append(x0) for x0 in sample(models.base, models.context, plan))
        seconds = chunk_seconds(run, kit.device)[setting.filling_chunks : -1]
        clip = torch.cat(latents, dim=2)
        plain = clip if plain is None else plain
        difference = float((clip - plain).abs().max())
        if store.exact and difference:
            raise AssertionError(f"store {name} changes latents by {difference}")
        kv, host = plan.memory(kit.case.config, kit.dtype).bytes_on(kit.device)
        results[name] = {
            "chunk_ms": 1e3 * statistics.median(seconds),
            "difference": difference,
            "kv_gb": kv / 1e9,
            "host_gb": host / 1e9,
            "peak_gb": kit.peak(),
        }
    return results
