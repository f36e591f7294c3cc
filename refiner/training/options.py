"""What a refiner's training may be told."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..memory.reflect import History, Previous, ReflectiveCache
from ..noise.refiner import LEVELS
from ..schedule import PRESETS, STEPS, Preset
from .adapters import Start
from .dmd import DmdOptions
from .learner import warm_cosine
from .precision import Precision

Method = Literal["autorefiner", "init-noise", "lora"]
Aim = Literal["dmd", "reward"]
MOST_RANK = 1024  # beyond it a LoRA is as large as the weights that it spares
LARGEST = 3e38  # of fp32


@dataclass(frozen=True, slots=True)
class RefineOptions:
    """Training options. Frames are latent; a step samples `batch` · `accumulation` clips.

    With objective `dmd` the critic learns at every step and the refiner at every `ratio`-th after
    the critic's warm-up; with `reward` the refiner learns at every step. The refiner's rate rises
    over `warmup` of its updates and falls to 0 along a cosine.
    """

    method: Method = "autorefiner"
    objective: Aim = "dmd"
    start: Start = "head"
    history: History = "shared"
    previous: Previous = "pending"
    levels: tuple[int, ...] = tuple(sorted(LEVELS, reverse=True))  # refined, nominal
    rank: int = 64
    steps: int = 2000
    batch: int = 16
    accumulation: int = 4
    antithetic: bool = False  # clips in pairs: one prompt, noises of opposite sign
    frames: int = 21
    height: int = 8  # of the latents
    width: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.05  # share of the refiner's updates
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's, of the refiner
    critic_rate: float = 1e-4
    critic_warmup: int = 150  # steps before the refiner's first update, at most a quarter of all
    ratio: int = 2
    score_draws: int = 1  # noises that each clip is scored with, with objective dmd
    ema: float = 0.999  # longest memory of the average; a short run averages its last eighth
    l2: float = 0.03  # weight of ½ mean(Δ²), with objective reward
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
        named = (("method", Method), ("objective", Aim), ("start", Start), ("precision", Precision))
        for name, allowed in named:
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not known: use {', '.join(get_args(allowed))}"
                )
        ReflectiveCache(self.history, self.previous)

    def _check_numbers(self) -> None:
        for name in (
            "rank",
            "steps",
            "batch",
            "accumulation",
            "frames",
            "ratio",
            "shown",
            "score_draws",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: give at least 1")
        if self.rank > MOST_RANK:
            raise ValueError(f"rank {self.rank}: give at most {MOST_RANK}, the paper's is 128")
        for name in ("height", "width"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ValueError(
                    f"{name} {getattr(self, name)}: give an even number from 2 on, of latents (8 pixels)"
                )
        for name in ("learning_rate", "critic_rate"):
            if not 0 < getattr(self, name) <= 1:  # no NaN is
                raise ValueError(
                    f"{name} {getattr(self, name)}: give one above 0 and at most 1, like 1e-4"
                )
        if self.critic_warmup < 0:
            raise ValueError(
                f"critic_warmup {self.critic_warmup}: give a number of steps, 0 is none"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"warmup {self.warmup}: give a share of the updates, from 0 to below 1"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"betas {[*self.betas]}: give two from 0 to below 1, like [0.9, 0.999]"
            )
        if self.antithetic and self.batch % 2:
            raise ValueError(f"batch {self.batch} with antithetic pairs: give an even number")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema}: give one from 0, no average, to below 1")
        if not 0 <= self.l2 <= LARGEST:
            raise ValueError(f"l2 {self.l2}: a penalty is finite and not negative, 0 is none")
        if not abs(self.guidance) <= LARGEST:
            raise ValueError(f"guidance {self.guidance}: give a finite number, 0 is none")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}: give one from 0 to {(1 << 63) - 1}")

    def _check_levels(self) -> None:
        offered = self.preset.levels[1:]
        if unknown := set(self.levels) - set(offered):
            raise ValueError(
                f"levels {sorted(unknown)} are none that the preset renoises to: {offered}"
            )
        if self.method == "autorefiner" and not self.levels:
            instead = (
                f"give some of {offered}"
                if offered
                else "the preset renoises to none, so use another method"
            )
            raise ValueError(
                f"levels {[*self.levels]}: method autorefiner refines at least one, {instead}"
            )

    @property
    def dmd(self) -> DmdOptions:
        return DmdOptions(guidance=self.guidance)

    @property
    def cache(self) -> ReflectiveCache:
        """What T_φ sees; the initial noise comes before any prediction."""
        return ReflectiveCache(
            self.history, "none" if self.method == "init-noise" else self.previous
        )

    @property
    def exits(self) -> list[int]:
        """Indices of the levels that a training rollout may end at, the same for every method: the
        refined ones."""
        levels = range(len(self.preset.levels))
        return [i for i in levels if self.preset.levels[i] in self.levels] or [*levels]

    @property
    def refined(self) -> frozenset[int]:
        """Nominal steps of the levels that T_φ refines."""
        return frozenset({STEPS} if self.method == "init-noise" else self.levels)

    @property
    def first_update(self) -> int:
        """The step of the refiner's first update."""
        return min(self.critic_warmup, self.steps // 4) if self.objective == "dmd" else 0

    @property
    def updates(self) -> int:
        """Updates of the refiner in all."""
        every = self.ratio if self.objective == "dmd" else 1
        return -(-(self.steps - self.first_update) // every)

    def rate_factor(self, update: int) -> float:
        """Factor on the learning rate at one of the updates."""
        return warm_cosine(
            update, self.updates, warm=max(1, round(self.warmup * self.updates)), floor=0.0
        )
