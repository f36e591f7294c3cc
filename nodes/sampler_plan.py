"""Plan a run of Pathwise Refined Sampler from its inputs."""

from dataclasses import dataclass
from typing import Any

from ..refiner.choices import choose
from ..refiner.noise.source import WhiteNoise
from ..refiner.noise.sources import NOISES
from ..refiner.recipe import parse_recipe
from .options import CacheOptions, ChunkSchedule, preset_for
from .refiner_plan import RefinerLora, plan_refiner
from .run import (
    WHITE,
    ModelFacts,
    Run,
    begun_from,
    check_length,
    clip_shape,
    plan_run,
    start_of,
    steered,
)  # fmt: skip
from .search import RewardSearch
from .starts import source_latents, start_latents, started_at


@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """The inputs of the node, except MODEL and CONDITIONING; texts are parsed by `run`."""

    width: int
    height: int
    length: int
    batch_size: int
    seed: int
    method: str  # with its knobs
    noise: str = WHITE  # with its knobs
    latent: dict | None = None
    start: Any = None  # LATENT or IMAGE
    refiner: RefinerLora | None = None
    schedule: ChunkSchedule | None = None
    cache: CacheOptions | None = None
    search: RewardSearch | None = None
    vae: Any = None
    recipe: str = ""
    start_video: Any = None  # IMAGE or VIDEO
    start_level: int = 0  # nominal; only with a start_video

    def run(self, facts: ModelFacts) -> Run:
        """Plan the run on a model. Raises ValueError for inputs that do not fit together."""
        recipe = parse_recipe(self.recipe)
        if self.latent is None:
            check_length(self.length)
        preset = preset_for(facts.preset, self.schedule, self.cache, self.refiner is not None)
        if self.start_video is not None:
            preset = started_at(preset, self.start_level)
        refined = plan_refiner(
            self.refiner, facts.config, facts.dtype, preset.all_levels, self.schedule, self.cache,
            goes_on=self.start_video is not None,
        )  # fmt: skip
        shape = clip_shape(self.latent, self.width, self.height, self.length, self.batch_size)
        start = start_latents(self.start, self.vae, *shape[2:])
        initial = begun_from(start_of(start, facts), shape)
        plan = steered(plan_run(preset, shape, initial, self.cache), recipe)
        source = None
        if self.start_video is not None:
            source = source_latents(self.start_video, self.vae, plan)
        noise = choose(self.noise, NOISES, "noise")
        return Run(
            plan,
            self.seed,
            self.method,
            initial,
            noise(recipe.noise(WhiteNoise(self.seed)), preset.chunk),
            refined,
            self.search,
            self.noise,
            recipe=recipe,
            length=shape[1],
            source=source,
            objects=objects_of(self.refiner, self.search),
        )


def objects_of(refiner: RefinerLora | None, search: RewardSearch | None) -> tuple[Any, ...]:
    """Return the inputs that a clip depends on by their identity."""
    judged = (search.rewards, search.vae) if search else (None, None)
    return (refiner, *judged)
