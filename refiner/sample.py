"""Sample a video: from a network, a prompt and a seed to chunks of latents, one by one."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .memory.positions import check_cut
from .noise.refiner import Refiner
from .noise.source import NoiseSource, WhiteNoise
from .rollout import Progress, Rollout
from .run_plan import RunPlan
from .samplers import Method, as_method, self_forcing
from .timeline import Timeline
from .wan.causal import CausalWan

__all__ = ["RunPlan", "check_finite", "check_switches", "finite", "sample"]


@torch.no_grad()
def sample(
    network: CausalWan,
    context: Tensor | Timeline[Tensor],
    plan: RunPlan,
    *,
    seed: int = 0,
    noise: NoiseSource | None = None,
    initial: Tensor | None = None,
    source: Tensor | None = None,
    method: Method | Callable | None = None,
    refiner: Refiner | None = None,
    callback: Callable[[Progress], None] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] (fp32) of each new chunk as soon as it is committed.

    `context` is [1 or B, L, text_dim], or a timeline of contexts; `initial` holds the `plan.given`
    clean latents [B, C, given, h, w] to continue; `source` holds the clean latents [B, C, F, h, w]
    of another clip, at least as long, and every chunk starts from its frames with the noise of the
    chunk's first level; `noise` replaces the seed's white noise; `method`
    defaults to Self-Forcing; `refiner` refines the noise of either source. `device` and `dtype` of
    a pass default to those of the weights; a host that stores weights elsewhere (offloaded,
    quantised) passes those it computes with. Closing the iterator frees the memory. Raises
    ValueError when `initial`, `context` or the method do not fit the plan. Chunks are not checked
    for finite values, which would wait for the device: see `finite`.
    """
    method = as_method(method or self_forcing())
    method.check(plan.preset, refiner.cache if refiner else None)
    check_initial(initial, plan, network)
    check_source(source, plan, network)
    timeline = context if isinstance(context, Timeline) else Timeline.of(context)
    check_prompts(timeline, plan.batch)
    check_switches(timeline, plan, method)
    if not plan.chunks:
        return
    rollout = Rollout.of(
        network,
        timeline,
        plan,
        noise or WhiteNoise(seed),
        caches=method.caches(plan.levels),
        refiner=refiner,
        initial=initial,
        source=source,
        callback=callback,
        device=device,
        dtype=dtype,
    )
    try:
        rollout.commit_given()
        yield from method.run(rollout)
    finally:
        rollout.free()


def check_initial(initial: Tensor | None, plan: RunPlan, network: CausalWan) -> None:
    """Raise ValueError unless the clean latents are finite and as many as the plan says."""
    shape = (plan.batch, network.config.in_dim, plan.given, plan.height, plan.width)
    if initial is None:
        if plan.given:
            raise ValueError(f"latents to start from: none came, the plan expects {shape}")
        return
    if tuple(initial.shape) != shape:
        came = tuple(initial.shape)
        raise ValueError(f"latents to start from: {came} came, the plan expects {shape}")
    check_finite(initial, "the clip to start from")


def check_source(source: Tensor | None, plan: RunPlan, network: CausalWan) -> None:
    """Raise ValueError unless the latents to start chunks from are finite and long enough."""
    if source is None:
        return
    if plan.endless:
        raise ValueError("an endless run cannot start from a clip: give the run a length")
    frames = plan.given + plan.frames
    shape = (plan.batch, network.config.in_dim, source.shape[2], plan.height, plan.width)
    if tuple(source.shape) != shape or source.shape[2] < frames:
        expected = (*shape[:2], frames, *shape[3:])
        raise ValueError(
            f"latents to start chunks from: {tuple(source.shape)} came, the plan expects {expected}"
        )
    check_finite(source, "the clip to start chunks from")


def check_prompts(timeline: Timeline[Tensor], batch: int) -> None:
    """Raise ValueError unless each context holds one prompt, or one for each video."""
    for scene in timeline.scenes:
        if len(scene.prompt) not in (1, batch):
            raise ValueError(
                f"context of {len(scene.prompt)} prompts for {batch} videos: give one for all, or"
                " one for each"
            )


def check_switches(timeline: Timeline, plan: RunPlan, method: Method) -> None:
    """Raise ValueError for a change of prompt that the method, its caches or positions rule out."""
    if len(timeline.scenes) == 1:
        return
    method.check_timeline(timeline)
    if timeline.recached and plan.chunks and method.caches(plan.levels):
        raise ValueError(
            f"{method.name} has several memories, and a recache rewrites one: use `keep` or `flush`"
        )
    if timeline.cuts:
        check_cut(plan.positions)


def finite(chunks: Iterable[Tensor], given: int = 0) -> Iterator[Tensor]:
    """Pass chunks on, waiting for each; ValueError at the first chunk that is not finite.

    `given` is the number of chunks before them.
    """
    for number, x0 in enumerate(chunks, start=given + 1):
        check_finite(x0, f"chunk {number}")
        yield x0


def check_finite(latents: Tensor, name: str) -> None:
    """Raise ValueError unless every value is finite."""
    if not latents.isfinite().all():
        raise ValueError(
            f"{name} holds NaN or infinite values: try another dtype (bf16 or fp32), download the"
            " model again, or lower the strength of a LoRA or refiner"
        )
