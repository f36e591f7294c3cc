"""A whole run: from a network, a prompt and a seed to chunks of latents, one after the other."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory.plan import Keys, MemoryPlan
from .memory.ring import RingMemory
from .noise.refiner import Refiner
from .noise.source import NoiseSource, WhiteNoise
from .rollout import Progress, Rollout, Sampler
from .samplers import self_forcing
from .schedule import Preset, plan_chunks
from .wan.causal import CausalWan


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will make, checked and counted before it starts.

    `frames` new latent frames of `height` x `width` (latent, even) follow `given` clean ones.
    """

    preset: Preset
    frames: int
    height: int
    width: int
    batch: int = 1
    given: int = 0
    keys: Keys | None = None  # None: raw where the preset's positions move

    def __post_init__(self) -> None:
        if self.height < 2 or self.width < 2 or self.height % 2 or self.width % 2:
            raise ValueError(
                f"latents of {self.height}x{self.width}: height and width must be even and at least 2, so pixel sizes"
                " are multiples of 16"
            )
        if self.batch < 1:
            raise ValueError(f"batch of {self.batch}: ask for at least 1 video")
        plan_chunks(self.preset, self.frames, self.given)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Latent frames of every chunk, given ones first."""
        given, new = plan_chunks(self.preset, self.frames, self.given)
        return tuple(chunk.length for chunk in given + new)

    @property
    def given_chunks(self) -> int:
        """Chunks that the new ones follow."""
        return len(plan_chunks(self.preset, self.frames, self.given)[0])

    def memory(self, network: CausalWan, dtype: torch.dtype, refined: bool = False) -> MemoryPlan:
        """The K/V memory of this run; its `nbytes` is what will be allocated. A refiner needs a chunk more."""
        relative = self.preset.relative
        plan = MemoryPlan.of(
            network.config,
            (self.batch, network.config.in_dim, self.given + self.frames, self.height, self.width),
            window_frames=self.preset.window,
            sink_frames=self.preset.sink,
            keys=self.keys or ("raw" if relative else "rotated"),
            positions="window" if relative else "absolute",
            dtype=dtype,
            spare_frames=self.preset.chunk if refined else 0,
        )
        given, new = plan_chunks(self.preset, self.frames, self.given)
        plan.check_chunk(max(chunk.length for chunk in given + new))
        return plan


@torch.no_grad()
def sample(
    network: CausalWan,
    context: Tensor,
    plan: RunPlan,
    *,
    seed: int = 0,
    noise: NoiseSource | None = None,
    initial: Tensor | None = None,
    method: Sampler = self_forcing,
    refiner: Refiner | None = None,
    callback: Callable[[Progress], None] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] (fp32) of each new chunk as soon as it is committed.

    `context` is [1 or B, L, text_dim]; `initial` holds the `plan.given` clean latents [B, C, given, h, w] to go on
    from; `noise` replaces the seed's white noise; `refiner` works on whatever noise that is. Device and dtype of a
    pass are those of the weights, unless a host that keeps its weights elsewhere (offloaded, quantised) says where and
    in what it computes. Closing the iterator frees the memory. Raises ValueError when `initial` or `context` do not
    fit the plan. No chunk is checked here, which would wait for the device: see `finite`.
    """
    parameter = next(network.model.parameters())
    device, dtype = device or parameter.device, dtype or parameter.dtype
    shape = (plan.batch, network.config.in_dim, plan.given, plan.height, plan.width)
    if (initial is not None or plan.given) and (initial is None or tuple(initial.shape) != shape):
        came = "none" if initial is None else str(tuple(initial.shape))
        raise ValueError(f"latents to start from: {came} came, the plan expects {shape}")
    if len(context) not in (1, plan.batch):
        raise ValueError(
            f"context of {len(context)} prompts for {plan.batch} videos: give one for all, or one for each"
        )
    given, new = plan_chunks(plan.preset, plan.frames, plan.given)
    if initial is not None:
        check_finite(initial, "the clip to start from")
    if not new:
        return
    memory = RingMemory(plan.memory(network, dtype, refined=refiner is not None), device)
    context = context.to(device, dtype)
    rollout = Rollout(
        network=network,
        text=network.text(context),
        memory=memory,
        noise=noise or WhiteNoise(seed),
        chunks=new,
        frame_shape=(plan.batch, network.config.in_dim, plan.height, plan.width),
        device=device,
        network_dtype=dtype,
        callback=callback,
        refiner=refiner,
        refiner_text=refiner.text(context) if refiner else None,
        given=[
            (initial[:, :, chunk.start : chunk.start + chunk.length].to(device, torch.float32), chunk)
            for chunk in given
        ],
    )
    try:
        for latents, chunk in rollout.given:
            rollout.commit(latents, chunk)
        yield from method(rollout)
    finally:
        memory.free()


def finite(chunks: Iterable[Tensor], given: int = 0) -> Iterator[Tensor]:
    """Pass chunks on, each once its device has made it; ValueError at the first one that is not finite.

    `given` chunks came before them.
    """
    for number, x0 in enumerate(chunks, start=given + 1):
        check_finite(x0, f"chunk {number}")
        yield x0


def check_finite(latents: Tensor, name: str) -> None:
    """Raise ValueError unless every value is finite."""
    if not latents.isfinite().all():
        raise ValueError(
            f"{name} holds NaN or infinite values: try another dtype (bf16 or fp32), download the model again, or lower"
            " the strength of a LoRA or refiner"
        )
