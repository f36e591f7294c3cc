"""Values of CHUNK_SCHEDULE and REFLECTIVE_CACHE, and the preset that they result in."""

from dataclasses import dataclass

from ..refiner.memory.positions import POSITIONS as POSITIONS_BY_NAME
from ..refiner.memory.reflect import ReflectiveCache
from ..refiner.schedule import STEPS, Preset, check_levels, get_preset

FALLBACK = "self-forcing"  # for a MODEL without a preset
MODELS_OWN = "the model's"
AS_TRAINED = "as trained"
HISTORY_MODES = (AS_TRAINED, "shared", "none")
X0_MODES = (AS_TRAINED, "joint", "pending", "none")
LONGEST_LEVELS = 200  # characters
POSITIONS = (MODELS_OWN, *POSITIONS_BY_NAME)
FORMER_POSITIONS = {"relative to the window": "relative"}  # in older workflows


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """Chunk size and noise levels. Empty or None: as the preset has it; no preset: the model's."""

    preset: str | None = None
    levels: tuple[int, ...] = ()
    chunk: int | None = None
    first_levels: tuple[int, ...] = ()
    refined: tuple[int, ...] = ()

    def applied(self, preset: Preset) -> Preset:
        """Return the chosen or the model's preset with this schedule's levels and chunk size."""
        base = get_preset(self.preset) if self.preset else preset
        return base.changed(
            levels=self.levels or None,
            chunk=self.chunk,
            first_levels=self.first_levels or None,
        )


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Frames that memory holds (a window of -1: all), and a refiner's view of them."""

    window: int = -1
    sink: int = 0
    positions: str | None = None  # None: the preset's
    history: str = AS_TRAINED
    previous_x0: str = AS_TRAINED

    def applied(self, preset: Preset) -> Preset:
        """Return the preset with this window, sink and positions."""
        return preset.changed(window=self.window, sink=self.sink, positions=self.positions)

    def reflected(self, trained: ReflectiveCache) -> ReflectiveCache:
        """Return a refiner's cache with the modes chosen here, by default those of its training."""
        history, previous = self.history, self.previous_x0
        return ReflectiveCache(
            trained.history if history == AS_TRAINED else history,
            trained.previous if previous == AS_TRAINED else previous,
        )


def parse_positions(name: str) -> str | None:
    """Return the positions that a widget names, None for the model's; ValueError lists names."""
    name = FORMER_POSITIONS.get(name, name)
    if name not in POSITIONS:
        raise ValueError(f"positions {name[:40]!r}: use one of {', '.join(POSITIONS)}")
    return None if name == MODELS_OWN else name


def parse_levels(text: str, name: str, pure_noise: bool = True) -> tuple[int, ...]:
    """Parse a widget's nominal levels, like "1000, 750, 500, 250"; empty text has none.

    With `pure_noise` the first level must be 1000. Raises ValueError that names the widget.
    """
    if not text.strip():
        return ()
    numbers = [number.strip() for number in text.split(",")]
    if len(text) > LONGEST_LEVELS or not all(number.isdecimal() for number in numbers):
        raise ValueError(
            f"{name} {text[:60]!r}: give whole numbers with commas between, like 1000, 750, 500,"
            " 250"
        )
    levels = tuple(int(number) for number in numbers)
    try:
        check_levels(levels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if pure_noise and levels[0] != STEPS:
        raise ValueError(f"{name} {text!r}: a chunk begins from pure noise, so begin with {STEPS}")
    return levels


def refuse_without_refiner(schedule: ChunkSchedule | None, cache: CacheOptions | None) -> None:
    """Raise ValueError for options that only a refiner reads."""
    options = {}
    if schedule is not None and schedule.refined:
        levels = ", ".join(map(str, schedule.refined))
        options["refined_levels of CHUNK_SCHEDULE"] = (levels, "leave it empty")
    if cache is not None:
        default = f"leave it at {AS_TRAINED!r}"
        options["history of REFLECTIVE_CACHE"] = (cache.history, default)
        options["previous_x0 of REFLECTIVE_CACHE"] = (cache.previous_x0, default)
    for name, (value, instead) in options.items():
        if value != AS_TRAINED:
            raise ValueError(
                f"{name} is {value!r}, which says what a refiner does: connect a REFINER,"
                f" or {instead}"
            )


def preset_for(
    name: str | None,
    schedule: ChunkSchedule | None,
    cache: CacheOptions | None,
    refined: bool = False,
) -> Preset:
    """Apply the connected options to a preset (None: FALLBACK).

    Raises ValueError for options that contradict each other, or need a refiner without `refined`.
    """
    if not refined:
        refuse_without_refiner(schedule, cache)
    preset = get_preset(name or FALLBACK)
    preset = schedule.applied(preset) if schedule is not None else preset
    return cache.applied(preset) if cache is not None else preset
