"""The sections of `gpu.py` on decoding beside sampling, and on memory over a long run of both."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import TypeAlias

import torch
from gpu_sections import SETTINGS, SIZES, SMALLEST, Kit, Models, vae_of
from long_video import GROWTH, resident
from torch import Tensor

from autorefiner.refiner.bench import BenchSize, measure_decode
from autorefiner.refiner.beside import Stage
from autorefiner.refiner.sample import finite, sample
from autorefiner.refiner.video import to_frames
from autorefiner.refiner.wan.compiled import Compiler
from autorefiner.refiner.wan.tiny_vae import TinyVAE
from autorefiner.refiner.wan.vae import DecoderState, WanVAE
from autorefiner.refiner.wan.vae_layers import channels_last

Decoder: TypeAlias = WanVAE | TinyVAE
MARKS = (100, 1000)  # chunks after which memory is measured; nothing may grow between them
SIZES["long"] = BenchSize(SMALLEST, 16, 16, 8)


@torch.no_grad()
def decoding(kit: Kit) -> dict:
    """Time chunks sampled alone, decoded in turn, and decoded beside on a stream of their own.

    Pixels go to the host as bytes either way. A loss is that of sampling by the decoder beside.
    """
    models, results = Models.of(kit), {}
    alone = frames_per_second(kit, finite(sampled(kit, models)))
    results["sampling"] = {"frames_per_second": alone}
    decoders = {
        "full decoder": vae_of(kit),
        "channels last": channels_last(vae_of(kit)),
        "tiny decoder": TinyVAE().to(kit.device, kit.dtype).requires_grad_(False),
    }
    for name, decoder in decoders.items():
        results[name] = decoded(kit, models, decoder, alone)
    return results


@torch.no_grad()
def compiled_decoding(kit: Kit) -> dict:
    """Time the full decoder as `decoding` does, with channels last and compiled."""
    models, vae = Models.of(kit), channels_last(vae_of(kit))
    vae.compile_decoder(Compiler())
    start = perf_counter()
    measure_decode(vae, latents_of(kit), kit.device)
    compiling = perf_counter() - start
    alone = frames_per_second(kit, finite(sampled(kit, models)))
    return {"compiled": {"first_s": compiling, **decoded(kit, models, vae, alone)}}


def decoded(kit: Kit, models: Models, decoder: Decoder, alone: float) -> dict[str, float]:
    """Measure one decoder; `alone` are the frames a second of sampling."""
    decode_alone = measure_decode(decoder, latents_of(kit), kit.device)
    state = DecoderState()
    chunks = sampled(kit, models)
    in_turn = (to_frames(decoder.decode(x0.to(kit.dtype), state)) for x0 in chunks)
    rate = frames_per_second(kit, in_turn)
    kit.peak()
    with decoding_beside(kit, decoder) as stage:
        beside = frames_per_second(kit, handed(finite(sampled(kit, models)), stage))
    return {
        "decode_frames_per_second": decode_alone,
        "in_turn_frames_per_second": rate,
        "beside_frames_per_second": beside,
        "loss_percent": max(0.0, 100 * (1 - beside / alone)),
        "peak_gb": kit.peak(),
    }


def latents_of(kit: Kit) -> list[Tensor]:
    """Draw a warm-up chunk and those that are timed."""
    shape = 1, 16, SETTINGS[1].chunk, kit.case.height, kit.case.width
    return [torch.randn(shape, device=kit.device) for _ in range(kit.steady_chunks + 1)]


def sampled(kit: Kit, models: Models) -> Iterator[Tensor]:
    """Sample until the window is full, then the chunks that are timed, and one not committed."""
    setting = SETTINGS[1]
    plan = setting.plan(kit, setting.filling_chunks + kit.steady_chunks + 1)
    return sample(models.base, models.context, plan)


def frames_per_second(kit: Kit, chunks: Iterator[object]) -> float:
    """Return the median rate in a full window; each item must be finished when it comes."""
    setting = SETTINGS[1]
    times = [perf_counter() for _ in chunks]
    seconds = [late - early for early, late in pairwise(times)][setting.filling_chunks - 1 : -1]
    return 4 * setting.chunk / statistics.median(seconds)


@contextmanager
def decoding_beside(kit: Kit, decoder: Decoder) -> Iterator[Stage[Tensor]]:
    """Decode what is put to bytes on the host, as `autorefiner generate` does on a GPU."""
    state = DecoderState()

    def decode(x0: Tensor) -> None:
        to_frames(decoder.decode(x0.to(kit.dtype), state))

    with Stage(decode, "decode video", kit.device) as stage:
        yield stage


def handed(chunks: Iterator[Tensor], stage: Stage[Tensor]) -> Iterator[None]:
    """Put each chunk as it comes."""
    for x0 in chunks:
        stage.put(x0)
        yield


@torch.no_grad()
def fragmentation(kit: Kit) -> dict:
    """Sample and decode 1,000 chunks of a small model; compare memory after 100 and at the end.

    On a GPU `unused_mb` is what the allocator holds and no tensor does.
    """
    kit = replace(kit, size="long")
    models, results = Models.of(kit), {}
    plan = SETTINGS[1].plan(kit, MARKS[-1])
    chunks = sample(models.base, models.context, plan)
    with decoding_beside(kit, vae_of(kit)) as stage:
        for number, x0 in enumerate(chunks, 1):
            stage.put(x0)
            if number in MARKS:
                results[f"after {number:,} chunks"] = memory_use(kit)
    first, last = results.values()
    grown = max(last[name] - first[name] for name in first)
    return {**results, "flat": 1e6 * grown < GROWTH}


def memory_use(kit: Kit) -> dict[str, float]:
    """Return megabytes of the allocator, and its retries; on a CPU, of the process."""
    if kit.device.type != "cuda":
        return {"resident_mb": resident() / 1e6}
    torch.cuda.synchronize(kit.device)
    stats = torch.cuda.memory_stats(kit.device)
    allocated, reserved, split = (
        stats[f"{name}_bytes.all.current"] / 1e6
        for name in ("allocated", "reserved", "inactive_split")
    )
    return {
        "allocated_mb": allocated,
        "reserved_mb": reserved,
        "unused_mb": reserved - allocated,
        "inactive_split_mb": split,
        "alloc_retries": stats["num_alloc_retries"],
    }
