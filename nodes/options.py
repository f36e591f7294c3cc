"""What CHUNK_SCHEDULE and REFLECTIVE_CACHE hold, and what they make of a model's preset."""

from dataclasses import dataclass

from ..refiner.memory import reflect
from ..refiner.schedule import STEPS, Preset, check_steps, get_preset

FALLBACK = "self-forcing"  # of a model that does not say how it is sampled
MODELS_OWN = "the model's"
AS_TRAINED = "as trained"
HISTORY_MODES = (AS_TRAINED, "shared", "none")
X0_MODES = (AS_TRAINED, "joint", "pending", "none")
POSITIONS = {MODELS_OWN: None, "absolute": False, "relative to the window": True}


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """How chunks are cut and denoised; what is empty or None is left to the preset, and no preset to the model."""

    preset: str | None = None
    levels: tuple[int, ...] = ()
    chunk: int | None = None
    first_levels: tuple[int, ...] = ()
    refined: tuple[int, ...] = ()

    def applied(self, preset: Preset) -> Preset:
        """The model's preset with this schedule in its place."""
        base = get_preset(self.preset) if self.preset else preset
        return base.changed(steps=self.levels or None, chunk=self.chunk, first_steps=self.first_levels or None)


@dataclass(frozen=True, slots=True)
class ReflectiveCache:
    """What is held of the past (frames are latent; a window of -1 is all) and what a refiner sees of it."""

    window: int = -1
    sink: int = 0
    relative: bool | None = None
    history: str = AS_TRAINED
    previous_x0: str = AS_TRAINED

    def applied(self, preset: Preset) -> Preset:
        """The preset with this window, sink and positions."""
        return preset.changed(window=self.window, sink=self.sink, relative=self.relative)

    def reflected(self, trained: reflect.ReflectiveCache) -> reflect.ReflectiveCache:
        """The modes of a refiner's cache, those that it was trained with where nothing else is said."""
        history, previous = trained.history, trained.previous
        return reflect.ReflectiveCache(
            history if self.history == AS_TRAINED else self.history,
            previous if self.previous_x0 == AS_TRAINED else self.previous_x0,
        )


def parse_levels(text: str, name: str, pure_noise: bool = True) -> tuple[int, ...]:
    """Nominal levels of a widget, like "1000, 750, 500, 250"; none of an empty one.

    Levels that begin from `pure_noise` fall from 1000. Raises ValueError that names the widget.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not parts:
        return ()
    if len(text) > 200 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name} {text[:60]!r}: give whole numbers with commas between, like 1000, 750, 500, 250")
    steps = tuple(int(part) for part in parts)
    try:
        check_steps(steps)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if pure_noise and steps[0] != STEPS:
        raise ValueError(f"{name} {text!r}: a chunk begins from pure noise, so begin with {STEPS}")
    return steps


def refuse_without_refiner(schedule: ChunkSchedule | None, cache: ReflectiveCache | None) -> None:
    """Raise ValueError for options that only mean something to a refiner, which is not connected."""
    asked = {}
    if schedule is not None and schedule.refined:
        asked["refined_levels of CHUNK_SCHEDULE"] = (", ".join(map(str, schedule.refined)), "leave it empty")
    if cache is not None:
        stay = f"leave it at {AS_TRAINED!r}"
        asked["history of REFLECTIVE_CACHE"] = (cache.history, stay)
        asked["previous_x0 of REFLECTIVE_CACHE"] = (cache.previous_x0, stay)
    for name, (value, instead) in asked.items():
        if value != AS_TRAINED:
            raise ValueError(f"{name} is {value!r}, which says what a refiner does: connect a REFINER, or {instead}")


def preset_for(
    name: str | None, schedule: ChunkSchedule | None, cache: ReflectiveCache | None, refined: bool = False
) -> Preset:
    """The preset of a model by name (None: Self-Forcing's) under the options that are connected.

    Raises ValueError when they do not go together, or need a refiner and it is not `refined`.
    """
    if not refined:
        refuse_without_refiner(schedule, cache)
    preset = get_preset(name or FALLBACK)
    preset = schedule.applied(preset) if schedule is not None else preset
    return cache.applied(preset) if cache is not None else preset
