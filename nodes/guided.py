"""A run inside SamplerCustomAdvanced: its levels from SIGMAS, its noise from NOISE."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..refiner.noise.source import Draw, NoiseSource, WhiteNoise
from ..refiner.recipe import parse_recipe
from ..refiner.schedule import STEPS, Chunk, Level, Preset
from .options import CacheOptions, ChunkSchedule, preset_for
from .refiner_plan import RefinerLora, plan_refiner
from .run import (
    ModelFacts,
    Run,
    Search,
    begun_from,
    plan_run,
    start_of,
    steered,
    video_latents,
)  # fmt: skip

SAME_SIGMA = 2e-3  # sigmas that differ by less count as one level
SEEDS = 1 << 63  # number of seeds of WhiteNoise; NOISE has twice as many


@dataclass(frozen=True, slots=True)
class GivenLevels(Preset):
    """Make a preset with the levels of SIGMAS."""

    given: tuple[Level, ...] = ()

    def chunk_levels(self, first: bool = False) -> tuple[Level, ...]:
        return self.given


def nominal(sigma: float, preset: Preset) -> int:
    """Return the nominal step, 1 to 1000, of a sigma: the preset's shift undone."""
    u = sigma / (preset.shift - (preset.shift - 1) * sigma) if preset.warp else sigma
    return max(1, round(STEPS * u))


def levels_of(sigmas: Tensor, preset: Preset) -> tuple[Level, ...]:
    """Name SIGMAS by the preset's nominal steps. ValueError unless they fall from 1 to 0."""
    values = [float(sigma) for sigma in sigmas]
    falling = all(above - below > 1e-3 for above, below in pairwise(values))
    if len(values) < 2 or not falling or abs(values[0] - 1) > SAME_SIGMA or values[-1] != 0:
        listed = ", ".join(f"{value:.4g}" for value in values[:8]) or "nothing"
        raise ValueError(
            f"SIGMAS are {listed}: every chunk goes from pure noise to clean latents, so give"
            " sigmas that fall from 1 to 0 by more than 0.001 each (shift 5 and 4 simple steps are"
            " Self-Forcing's)"
        )
    steps = distinct([nominal(sigma, preset) for sigma in values[:-1]])
    return tuple(
        Level(step, STEPS * sigma, sigma) for step, sigma in zip(steps, values, strict=False)
    )


def distinct(steps: Sequence[int]) -> list[int]:
    """Lower falling steps until no two are equal: levels of one step would share their noise."""
    falling: list[int] = []
    for place, step in enumerate(steps):
        below = falling[-1] - 1 if falling else STEPS
        falling.append(max(min(step, below), len(steps) - place))
    return falling


@dataclass(frozen=True, slots=True)
class GuiderNoise:
    """Start chunks from their frames of NOISE; draw all else from `later`.

    The candidates of a search beside the first, rerolled chunks, and chunks after the end of NOISE
    draw from `later` at every level.
    """

    noise_BCFhw: Tensor
    later: NoiseSource

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        noise = self.noise_BCFhw[:, :, chunk.start : chunk.start + chunk.length]
        is_first = draw.step == chunk.levels[0].step
        if not is_first or draw.candidate or draw.take or noise.shape[2] < chunk.length:
            return self.later(chunk, draw, shape)
        return noise


@dataclass(frozen=True, slots=True)
class CoreNoise:
    """The noise that ComfyUI's SamplerARVideo draws between levels, which depends on the device.

    It has none for repeats, candidates and takes, which get white noise of the same seed.
    """

    seed: int
    device: torch.device

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        if draw.repeat or draw.candidate or draw.take:
            return WhiteNoise(self.seed % SEEDS)(chunk, draw, shape)
        level = [level.step for level in chunk.levels].index(draw.step)
        seed = (self.seed + 1000 * chunk.index + level - 1) % (2 * SEEDS)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)


FRESH_NOISE = ("per chunk and level", "as SamplerARVideo")


@dataclass(frozen=True, slots=True)
class SamplerOptions:
    """The inputs of a SAMPLER; the rest of its run comes from NOISE, SIGMAS and GUIDER."""

    method: str  # with its knobs
    fresh_noise: str = FRESH_NOISE[0]
    schedule: ChunkSchedule | None = None
    cache: CacheOptions | None = None
    start: dict | None = None
    refiner: RefinerLora | None = None
    search: Search | None = None
    recipe: str = ""
    objects: tuple[Any, ...] = ()  # inputs that the clip depends on by their identity
    vae: Any = None  # VAE that decodes the chunks for the page

    def run(self, facts: ModelFacts, noise: Tensor, sigmas: Tensor, seed: int) -> Run:
        """Plan a run over NOISE [B, C, F, h, w] along SIGMAS.

        Raises ValueError where CHUNK_SCHEDULE contradicts SIGMAS.
        """
        preset = preset_for(facts.preset, self.schedule, self.cache, self.refiner is not None)
        levels = levels_of(sigmas, preset)
        if self.schedule is not None:
            check_agreement(preset, self.schedule, levels)
        steps = {level.step for level in levels}
        refined = plan_refiner(
            self.refiner, facts.config, facts.dtype, steps, self.schedule, self.cache
        )
        named = {field: getattr(preset, field) for field in Preset.__dataclass_fields__}
        preset = GivenLevels(**named, given=levels)
        samples = video_latents({"samples": noise}, "latent_image")
        shape = (samples.shape[0], *samples.shape[2:])
        initial = begun_from(start_of(self.start, facts), shape)
        recipe = parse_recipe(self.recipe)
        as_core = self.fresh_noise == FRESH_NOISE[1]
        later = CoreNoise(seed, noise.device) if as_core else WhiteNoise(seed % SEEDS)
        return Run(
            steered(plan_run(preset, shape, initial, self.cache), recipe),
            seed,
            self.method,
            initial,
            recipe.noise(GuiderNoise(samples, later)),
            refined,
            self.search,
            f"of NOISE, {self.fresh_noise}",
            recipe=recipe,
            length=shape[1],
            given_noise=samples,
            objects=self.objects,
        )


def check_agreement(preset: Preset, schedule: ChunkSchedule, levels: tuple[Level, ...]) -> None:
    """Raise ValueError when a CHUNK_SCHEDULE has other levels than SIGMAS."""
    if not (schedule.preset or schedule.levels or schedule.first_levels):
        return
    sigmas = [level.sigma for level in levels]
    for is_first in (False, True):
        scheduled = [level.sigma for level in preset.chunk_levels(is_first)]
        if same_sigmas(scheduled, sigmas):
            continue
        where = " for the first chunk" if is_first else ""
        raise ValueError(
            f"CHUNK_SCHEDULE says sigmas {listed(scheduled)}{where} and SIGMAS are"
            f" {listed(sigmas)}: make them agree, or leave the schedule's levels to SIGMAS (no"
            " preset, no levels)"
        )


def same_sigmas(one: Sequence[float], other: Sequence[float]) -> bool:
    if len(one) != len(other):
        return False
    return all(abs(a - b) <= SAME_SIGMA for a, b in zip(one, other, strict=True))


def listed(sigmas: Sequence[float]) -> str:
    """Sigmas and their final 0, as an error shows them."""
    return ", ".join(f"{sigma:.4f}" for sigma in [*sigmas, 0])
