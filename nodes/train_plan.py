"""A request of Train Refiner LoRA, checked before anything is loaded, and its run's folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..refiner.estimate import parameter_count
from ..refiner.memory.reflect import ReflectiveCache
from ..refiner.noise.file import RefinerCard
from ..refiner.schedule import Preset
from ..refiner.training import begun
from ..refiner.training.options import RefineOptions
from ..refiner.wan.lora import LoraPair
from ..refiner.wan.torch_file import load_torch
from .api import host
from .options import CacheOptions, ChunkSchedule, parse_levels, preset_for
from .paths import SHOWN, check_inside
from .refiner import LONGEST_NAME, is_plain_name
from .refiner_plan import RefinerLora
from .rewards import Rewards
from .run import ModelFacts, clip_shape

RUNS = "autorefiner"  # subfolder of the output folder
OBJECTIVES, METHODS = ("dmd", "reward"), ("autorefiner", "init-noise")
MOST_PROMPTS, MOST_TEXT = 4096, 1 << 20
LONGEST, WIDEST = 1021, 2048  # pixel frames; pixels of a side
GROWS = ("steps",)  # options that a resumed run may change
GUIDANCE, WARMUP = RefineOptions().guidance, RefineOptions().critic_warmup
# Copies of a teacher's weights: itself, and the critic with its average, gradient and Adam's two.
COPIES = 6


@dataclass(frozen=True, slots=True)
class TrainRequest:
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
    reflective_cache: CacheOptions | None = None
    guidance: float = GUIDANCE
    critic_warmup: int = WARMUP

    def options(self, facts: ModelFacts) -> RefineOptions:
        """Options of a training for this MODEL; ValueError for contradictory inputs."""
        cache, schedule = self.reflective_cache, self.chunk_schedule
        if cache is not None and (cache.window >= 0 or cache.positions is not None):
            raise ValueError(
                "REFLECTIVE_CACHE has a window or positions: a training sees all the past, leave"
                " them"
            )
        preset = preset_for(facts.preset, schedule, None, refined=True)
        modes = (cache or CacheOptions()).reflected(ReflectiveCache())
        batch, frames, height, width = clip_shape(
            None, self.width, self.height, self.length, self.batch_size
        )
        return RefineOptions(
            method=self.method,
            objective=self.objective,
            history=modes.history,
            previous=modes.previous,
            levels=self.refined(preset),
            rank=self.rank,
            steps=self.steps,
            batch=batch,
            accumulation=self.accumulation,
            frames=frames,
            height=height,
            width=width,
            learning_rate=self.learning_rate,
            ratio=self.critic_ratio,
            l2=self.l2,
            preset=preset,
            seed=self.seed,
            checkpointing=self.checkpointing,
            precision=self.precision,
            guidance=self.guidance,
            critic_warmup=self.critic_warmup,
        )

    def refined(self, preset: Preset) -> tuple[int, ...]:
        """Nominal levels to refine: the widget's, else the schedule's, else all but the first."""
        levels = parse_levels(self.levels, "levels", pure_noise=False)
        scheduled = self.chunk_schedule.refined if self.chunk_schedule else ()
        return levels or scheduled or preset.levels[1:]

    def check_sockets(self) -> None:
        """Raise ValueError for an input that the objective needs and lacks, or cannot use."""
        needed = {"dmd": ("teacher",), "reward": ("reward", "vae", "clip")}[self.objective]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"objective {self.objective} needs {' and '.join(missing)}: connect {missing[0]}"
            )
        if self.objective == "dmd" and self.clip is None and self.negative is None:
            raise ValueError(
                "objective dmd also needs an empty prompt: connect clip, or an empty CONDITIONING"
                " to negative"
            )
        if self.objective == "reward" and self.positive:
            raise ValueError(
                "a reward reads prompts as text: write them into prompts, and leave positive"
                " unconnected"
            )

    def lines(self) -> list[str]:
        """Return the prompts in text form; ValueError for too many, or none in any form."""
        lines = [line.strip() for line in self.prompts.splitlines() if line.strip()]
        if len(lines) > MOST_PROMPTS or len(self.positive) > MOST_PROMPTS:
            count = len(lines) or len(self.positive)
            raise ValueError(f"{count} prompts: at most {MOST_PROMPTS} are taken")
        if not lines and not self.positive:
            raise ValueError("there are no prompts: write one a line, or connect positive")
        if lines and self.clip is None:
            raise ValueError("prompts are written and nothing encodes them: connect clip")
        return lines


def check_name(run: str) -> str:
    """Return the name; ValueError where its folder would be hidden or outside the output folder."""
    if len(run) > LONGEST_NAME or not all(map(is_plain_name, run.split("/"))):
        raise ValueError(
            f"run {run[:60]!r}: give a name like foxes, or one in a folder, like mine/foxes"
        )
    return run


def run_folder(run: str) -> Path:
    """output/autorefiner/RUN; ValueError where a symlink leads it out of the output folder."""
    root = host.output_folder()
    folder = root / RUNS / check_name(run)
    check_inside(root, folder, f"run {run[:SHOWN]!r}")
    return folder


def begin(folder: Path, options: RefineOptions, base: str | None, words: Sequence[str]) -> int:
    """Begin or resume a run; returns the steps that it has taken.

    `words` are the run's prompts and its rewards' names. Raises ValueError where the folder holds a
    run with other options, base or words, or one that has taken more steps.
    """
    begun.begin(folder, {**asdict(options), "base": base, "words": begun.digest(words)}, GROWS)
    done = steps_taken(folder)
    if done > options.steps:
        raise ValueError(
            f"run {folder.name} has taken {done} steps: ask for that many or more, or give another"
            " name"
        )
    return done


def steps_taken(folder: Path) -> int:
    """Steps of a run's saved state, 0 without one; ValueError for a damaged state."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    try:
        return int(load_torch(path, mmap=True)["done"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is empty or damaged: give the run another name") from error


def check_memory(base: ModelFacts, teacher: ModelFacts | None) -> None:
    """Raise ValueError when the models alone take more memory than the device has."""
    nbytes = 4 * parameter_count(base.config)
    if teacher is not None:
        nbytes += 4 * COPIES * parameter_count(teacher.config)
    if nbytes > base.device_bytes:
        raise ValueError(
            f"the models take {nbytes / 1e9:.2f} GB and the device has"
            f" {base.device_bytes / 1e9:.2f} GB: use a smaller model or teacher, or a reward, which"
            " needs no teacher"
        )


def check_fit(base: ModelFacts, teacher: ModelFacts) -> None:
    """Raise ValueError unless both models have the same latents and text contexts."""
    if (base.config.in_dim, base.config.text_dim) != (
        teacher.config.in_dim,
        teacher.config.text_dim,
    ):
        raise ValueError(
            "teacher has other latents or another text encoder than model: use one of the base's"
            " kind"
        )


def refiner_of(
    name: str, pairs: Mapping[str, LoraPair], options: RefineOptions, base: str | None
) -> RefinerLora:
    """Return the trained REFINER, on the CPU."""
    pairs = {
        layer: LoraPair(pair.down.cpu(), pair.up.cpu(), pair.scale) for layer, pair in pairs.items()
    }
    card = RefinerCard(
        rank=options.rank,
        levels=tuple(sorted(options.refined, reverse=True)),
        history=options.cache.history,
        previous=options.cache.previous,
        base=base or "",
        objective=options.objective,
        steps=options.steps,
    )
    return RefinerLora(name, pairs, card)
