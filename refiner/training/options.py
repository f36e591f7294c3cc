"""Options of a refiner's training."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..memory.reflect import History, Previous, ReflectiveCache
from ..noise.refiner import LEVELS
from ..schedule import PRESETS, STEPS, Preset
from .adapters import FLOW_SHARE, Start
from .dmd import DmdOptions
from .learner import warm_cosine
from .precision import Precision

Method = Literal["autorefiner", "init-noise", "lora"]
Aim = Literal["dmd", "reward"]
MOST_RANK = 1024  # a larger LoRA is as big as the weights it adapts
POSITIVE = ("rank", "steps", "batch", "accumulation", "frames", "ratio", "shown", "score_draws")
LARGEST = 3e38  # about fp32's maximum


@dataclass(frozen=True, slots=True)
class RefineOptions:
    """Training options. Frames are latent; a step samples `batch` · `accumulation` clips.

    With objective `dmd` the critic learns at every step and, after the critic's warm-up, the
    refiner at every `ratio`-th; with `reward` the refiner learns at every step. The refiner's rate
    rises over `warmup` of its updates, then falls to 0 along a cosine.
    """

    method: Method = "autorefiner"
    objective: Aim = "dmd"
    start: Start = "head"
    flow_share: float = FLOW_SHARE  # c of start "flow": Δ begins at -c times the base's flow
    history: History = "shared"
    previous: Previous = "pending"
    levels: tuple[int, ...] = tuple(sorted(LEVELS, reverse=True))  # refined, nominal
    rank: int = 64
    steps: int = 2000
    batch: int = 16
    accumulation: int = 4
    antithetic: bool = False  # clips in pairs of one prompt, with noises of opposite sign
    frames: int = 21
    height: int = 8  # latent
    width: int = 8  # latent
    learning_rate: float = 1e-3
    warmup: float = 0.05  # share of the refiner's updates
    betas: tuple[float, float] = (0.9, 0.999)  # the refiner's AdamW
    critic_rate: float = 1e-4
    critic_warmup: int = 150  # steps before the refiner's first update, at most a quarter of all
    ratio: int = 2
    score_draws: int = 1  # noises per clip to score it with, for objective dmd
    ema: float = 0.999  # longest memory of the average; a short run averages its last eighth
    l2: float = 0.03  # weight of ½ mean(Δ²), with objective reward
    preset: Preset = PRESETS["self-forcing"]
    guidance: float = DmdOptions().guidance  # of the real score, for objective dmd
    seed: int = 0
    shown: int = 32
    checkpointing: bool = False
    precision: Precision = "bf16"  # of products; CPUs without bf16 products use fp32
    compiled: bool = False

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_levels()

    def _check_names(self) -> None:
        named = (("method", Method), ("objective", Aim), ("start", Start), ("precision", Precision))
        for name, allowed in named:
            if getattr(self, name) not in get_args(allowed):
                choices = ", ".join(get_args(allowed))
                raise ValueError(f"{name} {getattr(self, name)!r} is not known: use {choices}")
        ReflectiveCache(self.history, self.previous)

    def _check_numbers(self) -> None:
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: give at least 1")
        if self.rank > MOST_RANK:
            raise ValueError(f"rank {self.rank}: give at most {MOST_RANK}, the paper's is 128")
        for name in ("height", "width"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ValueError(
                    f"{name} {getattr(self, name)}:"
                    " give an even number of latents (8 pixels each), at least 2"
                )
        for name in ("learning_rate", "critic_rate"):
            if not 0 < getattr(self, name) <= 1:  # rejects NaN, too
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
        if not 0 < self.flow_share <= 1:
            raise ValueError(
                f"flow_share {self.flow_share}: give one above 0 and at most 1, like 0.03"
            )
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
        """What T_φ attends to; there is no prediction yet when the initial noise is refined."""
        return ReflectiveCache(
            self.history, "none" if self.method == "init-noise" else self.previous
        )

    @property
    def exits(self) -> list[int]:
        """Indices of the levels that a training rollout may end at: the refined ones.

        The same for every method.
        """
        levels = range(len(self.preset.levels))
        return [i for i in levels if self.preset.levels[i] in self.levels] or [*levels]

    @property
    def refined(self) -> frozenset[int]:
        """Nominal levels that T_φ refines."""
        return frozenset({STEPS} if self.method == "init-noise" else self.levels)

    @property
    def first_update(self) -> int:
        """The step of the refiner's first update."""
        return min(self.critic_warmup, self.steps // 4) if self.objective == "dmd" else 0

    @property
    def updates(self) -> int:
        """The refiner's total number of updates."""
        every = self.ratio if self.objective == "dmd" else 1
        return -(-(self.steps - self.first_update) // every)

    def rate_factor(self, update: int) -> float:
        """Return the learning rate's factor at an update."""
        return warm_cosine(
            update, self.updates, warm=max(1, round(self.warmup * self.updates)), floor=0.0
        )
