"""What a refiner's training may be told."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..memory.reflect import History, Previous, ReflectiveCache
from ..noise.refiner import LEVELS
from ..schedule import PRESETS, STEPS, Preset
from .dmd import DmdOptions
from .precision import Precision

Method = Literal["autorefiner", "init-noise", "lora"]
Aim = Literal["dmd", "reward"]


@dataclass(frozen=True, slots=True)
class RefineOptions:
    """Of a training. Frames are latent; a step takes `batch` · `accumulation` clips.

    With objective `dmd` the critic learns every step and the refiner every `ratio`-th; with `reward` the refiner every
    step, and the paper's learning rate is 2e-5.
    """

    method: Method = "autorefiner"
    objective: Aim = "dmd"
    history: History = "shared"
    previous: Previous = "pending"
    levels: tuple[int, ...] = tuple(sorted(LEVELS, reverse=True))  # refined, nominal
    rank: int = 64
    steps: int = 2000
    batch: int = 16
    accumulation: int = 1
    frames: int = 21
    height: int = 8  # of the latents
    width: int = 8
    learning_rate: float = 1e-4
    critic_rate: float = 1e-4
    ratio: int = 5
    ema: float = 0.99
    l2: float = 1.0  # weight of ½ mean(Δ²), with objective reward alone
    preset: Preset = PRESETS["self-forcing"]
    guidance: float = DmdOptions().guidance  # of the real score, with objective dmd
    seed: int = 0
    shown: int = 32
    checkpointing: bool = False
    precision: Precision = "bf16"  # of products; fp32 on a CPU that has none in bf16
    compiled: bool = False

    def __post_init__(self) -> None:
        named = (("method", Method), ("objective", Aim), ("precision", Precision))
        for name, allowed in named:
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} {getattr(self, name)!r} is not known: use {', '.join(get_args(allowed))}")
        ReflectiveCache(self.history, self.previous)
        for name in ("rank", "batch", "accumulation", "frames", "ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: give at least 1")
        if self.l2 < 0:
            raise ValueError(f"l2 {self.l2}: a penalty is not negative, 0 is none")
        unknown = set(self.levels) - set(self.preset.steps[1:])
        if unknown or not self.levels:
            raise ValueError(f"levels {sorted(unknown)} are none that the preset renoises to: {self.preset.steps[1:]}")

    @property
    def dmd(self) -> DmdOptions:
        return DmdOptions(guidance=self.guidance)

    @property
    def cache(self) -> ReflectiveCache:
        """What T_φ sees; the initial noise comes before any prediction."""
        return ReflectiveCache(self.history, "none" if self.method == "init-noise" else self.previous)

    @property
    def exits(self) -> list[int]:
        """Indices of the levels that a training rollout may end at: those with a refined noise, or any."""
        levels = range(len(self.preset.steps))
        return [i for i in levels if self.method != "autorefiner" or self.preset.steps[i] in self.levels]

    @property
    def refined(self) -> frozenset[int]:
        return frozenset({STEPS} if self.method == "init-noise" else self.levels)
