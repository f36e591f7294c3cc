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
MOST_RANK = 1024  # beyond it a LoRA is as large as the weights that it spares
LARGEST = 3e38  # of fp32


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
        self._check_names()
        self._check_numbers()
        self._check_levels()

    def _check_names(self) -> None:
        named = (("method", Method), ("objective", Aim), ("precision", Precision))
        for name, allowed in named:
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} {getattr(self, name)!r} is not known: use {', '.join(get_args(allowed))}")
        ReflectiveCache(self.history, self.previous)

    def _check_numbers(self) -> None:
        for name in ("rank", "steps", "batch", "accumulation", "frames", "ratio", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: give at least 1")
        if self.rank > MOST_RANK:
            raise ValueError(f"rank {self.rank}: give at most {MOST_RANK}, the paper's is 128")
        for name in ("height", "width"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ValueError(f"{name} {getattr(self, name)}: give an even number from 2 on, of latents (8 pixels)")
        for name in ("learning_rate", "critic_rate"):
            if not 0 < getattr(self, name) <= 1:  # no NaN is
                raise ValueError(f"{name} {getattr(self, name)}: give one above 0 and at most 1, like 1e-4")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema}: give one from 0, no average, to below 1")
        if not 0 <= self.l2 <= LARGEST:
            raise ValueError(f"l2 {self.l2}: a penalty is finite and not negative, 0 is none")
        if not abs(self.guidance) <= LARGEST:
            raise ValueError(f"guidance {self.guidance}: give a finite number, 0 is none")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}: give one from 0 to {(1 << 63) - 1}")

    def _check_levels(self) -> None:
        offered = self.preset.steps[1:]
        if unknown := set(self.levels) - set(offered):
            raise ValueError(f"levels {sorted(unknown)} are none that the preset renoises to: {offered}")
        if self.method == "autorefiner" and not self.levels:
            instead = f"give some of {offered}" if offered else "the preset renoises to none, so use another method"
            raise ValueError(f"levels {[*self.levels]}: method autorefiner refines at least one, {instead}")

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
