"""Values of CHUNK_SCHEDULE and REFLECTIVE_CACHE, and the preset that they result in."""

from dataclasses import dataclass, fields
from pathlib import Path

from ..refiner.choices import choose
from ..refiner.memory.policies import POLICIES, Window
from ..refiner.memory.policy import Policy
from ..refiner.memory.positions import POSITIONS as POSITIONS_BY_NAME
from ..refiner.memory.reflect import ReflectiveCache
from ..refiner.memory.store import PlainStore, Store
from ..refiner.memory.stores import STORES
from ..refiner.run_plan import suggested
from ..refiner.schedule import STEPS, Preset, check_levels, get_preset

FALLBACK = "self-forcing"  # for a MODEL without a preset
MODELS_OWN = "the model's"
AS_TRAINED = "as trained"
HISTORY_MODES = (AS_TRAINED, "shared", "none")
X0_MODES = (AS_TRAINED, "joint", "pending", "none")
LONGEST_LEVELS = 200  # characters
LONGEST_SETTINGS = 200  # characters
POSITIONS = (MODELS_OWN, *POSITIONS_BY_NAME)
MEMORIES = (MODELS_OWN, *POLICIES)
HEADS = "heads"  # the knob for a file of attention heads, and its folder in models/
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
    """Frames that memory holds, how a chunk reads them, and a refiner's view of them.

    A window of -1 holds all frames, or as many as the policy suggests.
    """

    window: int = -1
    sink: int = 0
    positions: str | None = None  # None: the preset's
    history: str = AS_TRAINED
    previous_x0: str = AS_TRAINED
    policy: Policy | None = None  # None: the preset's
    store: type[Store] = PlainStore

    @property
    def held(self) -> tuple[int, int]:
        """Window and sink: those that the policy suggests where no window is given."""
        if self.window < 0 and self.policy and self.policy.window:
            return self.policy.window
        return self.window, self.sink

    def applied(self, preset: Preset) -> Preset:
        """Return the preset with this window, sink and positions, else with the policy's."""
        policy = self.policy or choose(preset.memory, POLICIES, "memory")
        held = suggested(preset.changed(window=self.window, sink=self.sink), policy)
        return held.changed(positions=self.positions)

    def reflected(self, trained: ReflectiveCache) -> ReflectiveCache:
        """Return a refiner's cache with the modes chosen here, by default those of its training."""
        history, previous = self.history, self.previous_x0
        return ReflectiveCache(
            trained.history if history == AS_TRAINED else history,
            trained.previous if previous == AS_TRAINED else previous,
        )


def parse_positions(name: str, settings: str = "") -> str | None:
    """Return the positions of two widgets as text, None for the model's; ValueError lists names."""
    name = FORMER_POSITIONS.get(name, name)
    if name not in POSITIONS:
        raise ValueError(f"positions {name[:40]!r}: use one of {', '.join(POSITIONS)}")
    if name == MODELS_OWN:
        return None
    check_settings(settings, "positions_settings")
    text = f"{name}:{settings}" if settings.strip() else name
    choose(text, POSITIONS_BY_NAME, "positions")
    return text


def parse_policy(name: str, settings: str) -> Policy | None:
    """Return the memory policy of two widgets, None for the model's; ValueError lists names."""
    if name == MODELS_OWN:
        if settings.strip():
            raise ValueError(
                f"memory_settings {settings!r} are knobs of a policy: choose one as memory, or"
                " leave them empty"
            )
        return None
    return choose(f"{name}:{settings}", POLICIES, "memory")


def check_settings(settings: str, widget: str) -> None:
    """Raise ValueError for knobs that are too long to be any."""
    if len(settings) > LONGEST_SETTINGS:
        raise ValueError(
            f"{widget} of {len(settings)} characters: give at most {LONGEST_SETTINGS}, like"
            " k=4,recent=3"
        )


def policy_text(policy: Policy) -> str:
    """Write a policy with the knobs that differ from its defaults, like top-frames:k=2.

    Of a file it has the name alone.
    """
    default = POLICIES[policy.name]()
    values = {each.name: getattr(policy, each.name) for each in fields(policy) if each.init}
    changed = {name: each for name, each in values.items() if each != getattr(default, name)}
    shown = {name: Path(each).name if name == HEADS else each for name, each in changed.items()}
    knobs = ",".join(f"{name}={each}" for name, each in shown.items())
    return f"{policy.name}:{knobs}" if knobs else policy.name


def memory_text(policy: Policy | None, store: type[Store]) -> str:
    """Write a policy and a store that are not the default, as a part of a sentence."""
    is_default = policy is None or policy.name == Window.name
    text = "" if is_default else f", read by {policy_text(policy)}"
    return text if store is PlainStore else f"{text}, stored as {store_name(store)}"


def store_name(store: type[Store]) -> str:
    """Return the name of a store in STORES."""
    return next(name for name, each in STORES.items() if each is store)


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
