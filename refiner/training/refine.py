"""Training of a noise refiner by distribution matching (AutoRefiner, Algorithm 1 with eq. 5), and of its controls.

`autorefiner` learns T_φ on the path's noises, `init-noise` T_φ on the initial noise alone, `lora` plain branches on the
base itself: one loop, one objective, one budget.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..memory.graph import GraphMemory
from ..memory.plan import MemoryPlan
from ..memory.reflect import History, Previous, ReflectiveCache
from ..noise.refiner import LEVELS, Refiner
from ..noise.source import WhiteNoise
from ..rollout import Rollout
from ..schedule import PRESETS, STEPS, Level, Preset, plan_chunks
from ..wan.causal import CausalWan
from ..wan.lora import LoraPair
from ..wan.transformer import WanTransformer
from .adapters import attach_branches, branch_parameters, pairs_of
from .dmd import DmdOptions, critic_loss, dmd_gradient, dmd_loss, draw_sigma
from .learner import Learner, noise_stream, stream
from .precision import mixed_precision, training_host
from .self_rollout import self_rollout

Method = Literal["autorefiner", "init-noise", "lora"]


@dataclass(frozen=True, slots=True)
class RefineOptions:
    """Of a training; the critic learns every step, the refiner every `ratio`-th. Frames are latent."""

    method: Method = "autorefiner"
    history: History = "shared"
    previous: Previous = "pending"
    levels: tuple[int, ...] = tuple(sorted(LEVELS, reverse=True))  # refined, nominal
    rank: int = 64
    steps: int = 2000
    batch: int = 16
    frames: int = 21
    height: int = 8  # of the latents
    width: int = 8
    learning_rate: float = 1e-4
    critic_rate: float = 1e-4
    ratio: int = 5
    ema: float = 0.99
    preset: Preset = PRESETS["self-forcing"]
    dmd: DmdOptions = field(default_factory=DmdOptions)
    seed: int = 0
    shown: int = 32

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method {self.method!r} is not known: use {', '.join(get_args(Method))}")
        ReflectiveCache(self.history, self.previous)
        unknown = set(self.levels) - set(self.preset.steps[1:])
        if unknown or not self.levels:
            raise ValueError(f"levels {sorted(unknown)} are none that the preset renoises to: {self.preset.steps[1:]}")

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


class RefineStage:
    """State of a training: the factors and their average, the fake network, and what is frozen.

    `encode` turns prompts into contexts [B, L, text_dim]; `show` draws and scores the average, as a loop's stage does.
    """

    def __init__(
        self, options: RefineOptions, base: CausalWan, teacher: CausalWan, prompts: Sequence[str],
        encode: Callable[[list[str]], Tensor], show: Callable[["RefineStage", Path, int], dict[str, float]],
    ) -> None:  # fmt: skip
        self.options, self.prompts, self.encode, self._show = options, prompts, encode, show
        self.device = next(base.model.parameters()).device
        host = training_host(self.device)
        self.base, self.teacher = replace(base, host=host), replace(teacher, host=host)
        self.tree = attach_branches(self.base, options.rank, silent_head=options.method != "lora", seed=options.seed)
        self.factors = branch_parameters(self.tree)
        betas = (0.0, 0.999)
        self.learner = Learner(nn.ParameterList(self.factors.values()), options.learning_rate, options.ema, betas)
        fake = WanTransformer(teacher.config)
        fake.load_state_dict(teacher.model.state_dict())
        self.critic = Learner(fake.to(self.device), options.critic_rate, 0.0, betas, decay=0.01)
        self.fake = CausalWan(self.critic.model, teacher.config, host)
        self.residuals: list[tuple[Tensor, Level]] = []

    def state_dict(self) -> dict:
        return {"factors": self.learner.state_dict(), "critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.learner.load_state_dict(state["factors"])
        self.critic.load_state_dict(state["critic"])

    def step(self, index: int) -> dict[str, float]:
        logged = {"loss": self._teach_critic(index)}
        if index % self.options.ratio == 0:
            logged |= self._teach(index)
        return logged

    def show(self, folder: Path, index: int) -> dict[str, float]:
        return self._show(self, folder, index)

    def average(self) -> dict[str, LoraPair]:
        """The average factors by layer."""
        with torch.no_grad():
            kept = [factor.clone() for factor in self.factors.values()]
            for factor, average in zip(self.factors.values(), self.learner.average, strict=True):
                factor.copy_(average)
            pairs = pairs_of(self.tree)
            for factor, own in zip(self.factors.values(), kept, strict=True):
                factor.copy_(own)
        return pairs

    def refiner(self) -> Refiner | None:
        """T_φ as it stands, with its graph; None where the branches are the base's own."""
        if self.options.method == "lora":
            return None
        return Refiner(self.tree, self.options.cache, self.options.refined, watch=self._watch)

    def _watch(self, residual: Tensor, level: Level) -> None:
        if residual.requires_grad:
            self.residuals.append((residual, level))

    def rollout(self, index: int, use: int) -> tuple[Rollout, int, Tensor]:
        """A rollout of a step, the level at which it ends, and its context; all drawn from seed, step and use."""
        options, rng = self.options, stream(self.options.seed, index, use)
        prompts = [self.prompts[i] for i in rng.integers(len(self.prompts), size=options.batch)]
        with torch.no_grad():
            context = self.encode(prompts)
        network = self.tree if options.method == "lora" else self.base
        shape = (options.batch, network.config.in_dim, options.frames, options.height, options.width)
        refiner = self.refiner()
        rollout = Rollout(
            network=network,
            text=network.text(context),
            memory=GraphMemory(MemoryPlan.of(network.config, shape)),
            noise=WhiteNoise(int(rng.integers(1 << 62))),
            chunks=plan_chunks(options.preset, options.frames)[1],
            frame_shape=(*shape[:2], *shape[3:]),
            device=self.device,
            network_dtype=torch.float32,
            refiner=refiner,
            refiner_text=refiner.text(context) if refiner else None,
        )
        return rollout, int(rng.choice(options.exits)), context

    def _sampled(self, index: int, use: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clips of the trained path, their context, and noise and level to score them at."""
        rollout, exit_level, context = self.rollout(index, use)
        clean = self_rollout(rollout, exit_level, 0 if self.options.method == "init-noise" else None)
        generator = noise_stream(self.device, self.options.seed, index, use, 1)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        return clean, context, noise, draw_sigma(len(clean), self.options.dmd, generator)

    def _teach_critic(self, index: int) -> float:
        with mixed_precision(self.device):
            with torch.no_grad():
                clean, context, noise, sigma = self._sampled(index, use=0)
            loss = critic_loss(self.fake, clean, noise, sigma, self.fake.text(context))
        self.critic.step(loss, index, 1.0, clip=10.0)
        return loss.item()

    def _teach(self, index: int) -> dict[str, float]:
        self.residuals = []
        with mixed_precision(self.device):
            clean, context, noise, sigma = self._sampled(index, use=1)
            with torch.no_grad():
                nothing = self.encode([""] * len(clean))
                texts = self.teacher.text(context), self.teacher.text(nothing), self.fake.text(context)
            gradient = dmd_gradient(
                clean.detach(), noise, sigma, self.teacher, self.fake, texts, self.options.dmd.guidance
            )
        told = self._of_residuals()
        self.learner.step(dmd_loss(clean, gradient), index // self.options.ratio, 1.0, clip=10.0)
        self.residuals = []
        return {"gradient": gradient.abs().mean().item(), **told}

    @torch.no_grad()
    def _of_residuals(self) -> dict[str, float]:
        """Mean |Δ| of the refined level of this step."""
        if not self.residuals:
            return {}
        level = self.residuals[0][1].step
        return {f"change {level}": torch.stack([residual.abs().mean() for residual, _ in self.residuals]).mean().item()}
