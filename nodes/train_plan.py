"""What Train Refiner LoRA was asked for, checked before anything is loaded, and the folder that it trains in."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..refiner.estimate import parameter_count
from ..refiner.memory import reflect
from ..refiner.noise.file import RefinerCard
from ..refiner.schedule import Preset
from ..refiner.training import begun
from ..refiner.training.options import RefineOptions
from ..refiner.wan.lora import LoraPair
from ..refiner.wan.torch_file import load_torch
from .api import host
from .options import ChunkSchedule, ReflectiveCache, parse_levels, preset_for
from .paths import SHOWN, check_inside
from .refined import RefinerLora
from .refiner import LONGEST_NAME, PART
from .rewards import Rewards
from .run import ModelFacts, clip_shape

RUNS = "autorefiner"  # folder of the output folder
OBJECTIVES, METHODS = ("dmd", "reward"), ("autorefiner", "init-noise")
MOST_PROMPTS, MOST_TEXT = 4096, 1 << 20
LONGEST, WIDEST = 1021, 2048  # pixel frames; pixels a side
GROWS = ("steps",)  # what a run that goes on may be asked for anew
GUIDANCE, WARMUP = RefineOptions().guidance, RefineOptions().critic_warmup
COPIES = 6  # of the weights that a teacher takes: itself, and what learns with its average, gradient and Adam's two


@dataclass(frozen=True, slots=True)
class Asked:
    """The node's inputs."""

    model: Any
    objective: str
    method: str
    run: str
    prompts: str
    width: int
    height: int
    length: int
    steps: int
    batch_size: int
    rank: int
    levels: str
    learning_rate: float
    seed: int
    preview_every: int
    accumulation: int
    l2: float
    critic_ratio: int
    precision: str
    checkpointing: bool
    save_every: int
    clip: Any = None
    positive: tuple[list, ...] = ()  # CONDITIONING
    teacher: Any = None
    negative: list | None = None
    reward: Rewards | None = None
    vae: Any = None
    chunk_schedule: ChunkSchedule | None = None
    reflective_cache: ReflectiveCache | None = None
    guidance: float = GUIDANCE
    critic_warmup: int = WARMUP

    def options(self, facts: ModelFacts) -> RefineOptions:
        """How to train a refiner of this MODEL; ValueError for what does not go together."""
        cache, schedule = self.reflective_cache, self.chunk_schedule
        if cache is not None and (cache.window >= 0 or cache.relative is not None):
            raise ValueError("REFLECTIVE_CACHE has a window or positions: a training sees all the past, leave them")
        preset = preset_for(facts.preset, schedule, None, refined=True)
        modes = (cache or ReflectiveCache()).reflected(reflect.ReflectiveCache())
        batch, frames, height, width = clip_shape(None, self.width, self.height, self.length, self.batch_size)
        return RefineOptions(
            method=self.method, objective=self.objective, history=modes.history, previous=modes.previous,
            levels=self.refined(preset), rank=self.rank, steps=self.steps, batch=batch,
            accumulation=self.accumulation, frames=frames, height=height, width=width,
            learning_rate=self.learning_rate, ratio=self.critic_ratio, l2=self.l2, preset=preset, seed=self.seed,
            checkpointing=self.checkpointing, precision=self.precision, guidance=self.guidance,
            critic_warmup=self.critic_warmup,
        )  # fmt: skip

    def refined(self, preset: Preset) -> tuple[int, ...]:
        """The nominal levels whose noise is refined: the widget's, the schedule's, or all that are renoised to."""
        own = parse_levels(self.levels, "levels", pure_noise=False)
        scheduled = self.chunk_schedule.refined if self.chunk_schedule else ()
        return own or scheduled or preset.steps[1:]

    def check_sockets(self) -> None:
        """Raise ValueError for a model that the objective needs and that is not connected, or has no use."""
        needed = {"dmd": ("teacher",), "reward": ("reward", "vae", "clip")}[self.objective]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"objective {self.objective} needs {' and '.join(missing)}: connect {missing[0]}")
        if self.objective == "dmd" and self.clip is None and self.negative is None:
            raise ValueError(
                "objective dmd also needs an empty prompt: connect clip, or an empty CONDITIONING to negative"
            )
        if self.objective == "reward" and self.positive:
            raise ValueError("a reward reads prompts as text: write them into prompts, and leave positive unconnected")

    def lines(self) -> list[str]:
        """The prompts that are written, one a line; ValueError for too many of them, or none at all."""
        found = [line.strip() for line in self.prompts.splitlines() if line.strip()]
        if len(found) > MOST_PROMPTS or len(self.positive) > MOST_PROMPTS:
            raise ValueError(f"{len(found) or len(self.positive)} prompts: at most {MOST_PROMPTS} are taken")
        if not found and not self.positive:
            raise ValueError("there are no prompts: write one a line, or connect positive")
        if found and self.clip is None:
            raise ValueError("prompts are written and nothing encodes them: connect clip")
        return found


def check_name(run: str) -> str:
    """The name of a run's folder; ValueError for one that leaves the output folder, or hides."""
    parts = run.split("/")
    if len(run) > LONGEST_NAME or not all(PART.fullmatch(part) and part == part.rstrip(" .") for part in parts):
        raise ValueError(f"run {run[:60]!r}: give a name like foxes, or one in a folder, like mine/foxes")
    return run


def run_folder(run: str) -> Path:
    """output/autorefiner/RUN, wherever links in it lead still inside the output folder."""
    root = host.output_folder()
    folder = root / RUNS / check_name(run)
    check_inside(root, folder, f"run {run[:SHOWN]!r}")
    return folder


def begin(folder: Path, options: RefineOptions, base: str | None, told: Sequence[str]) -> int:
    """Steps that the run has taken.

    `told` are the words that a run depends on: prompts, and the names of rewards. ValueError where a run of that name
    was begun otherwise, or went farther.
    """
    begun.begin(folder, {**asdict(options), "base": base, "words": begun.digest(told)}, GROWS)
    done = steps_taken(folder)
    if done > options.steps:
        raise ValueError(f"run {folder.name} has taken {done} steps: ask for that many or more, or give another name")
    return done


def steps_taken(folder: Path) -> int:
    """Of a run's saved state; ValueError for a damaged one."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    try:
        return int(load_torch(path, mmap=True)["done"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is empty or damaged: give the run another name") from error


def check_memory(base: ModelFacts, teacher: ModelFacts | None) -> None:
    """Raise ValueError when the models of a training alone are more than the device has."""
    nbytes = 4 * parameter_count(base.config) + (4 * COPIES * parameter_count(teacher.config) if teacher else 0)
    if nbytes > base.device_bytes:
        raise ValueError(
            f"the models take {nbytes / 1e9:.2f} GB and the device has {base.device_bytes / 1e9:.2f} GB: use"
            " a smaller model or teacher, or a reward, which needs no teacher"
        )


def check_fit(base: ModelFacts, teacher: ModelFacts) -> None:
    """Raise ValueError unless a teacher scores what this base makes."""
    one, other = ((facts.config.in_dim, facts.config.text_dim) for facts in (base, teacher))
    if one != other:
        raise ValueError("teacher has other latents or another text encoder than model: use one of the base's kind")


def refiner_of(name: str, pairs: Mapping[str, LoraPair], options: RefineOptions, base: str | None) -> RefinerLora:
    """The REFINER that was trained, on the CPU."""
    cache = options.cache
    pairs = {layer: LoraPair(pair.down.cpu(), pair.up.cpu(), pair.scale) for layer, pair in pairs.items()}
    card = RefinerCard(
        rank=options.rank, levels=tuple(sorted(options.refined, reverse=True)), history=cache.history,
        previous=cache.previous, base=base or "", objective=options.objective, steps=options.steps,
    )  # fmt: skip
    return RefinerLora(name, pairs, card)
