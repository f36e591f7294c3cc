"""Training of a noise refiner (AutoRefiner, Algorithm 1), and of its controls.

`autorefiner` learns T_φ on the path's noises, `init-noise` T_φ on the initial noise alone, `lora`
plain branches on the base itself: one loop, one objective, one budget.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..memory.graph import GraphMemory
from ..noise.refiner import Refiner
from ..noise.source import AntitheticNoise, GivenNoise, NoiseSource, WhiteNoise
from ..rollout import Rollout
from ..sample import RunPlan
from ..schedule import plan_chunks
from ..wan.causal import CausalWan
from ..wan.lora import LoraPair
from ..wan.upload import upload
from .adapters import attach_branches, branch_parameters, pairs_of
from .distributed import rank, sharded, world
from .gradient_signal import Signal
from .learner import FirstHalf, Learner, stream
from .objective import Means, Objective, Part
from .options import RefineOptions
from .precision import for_training, mixed_precision
from .replay import Replay, replayable
from .residuals import Residuals
from .self_rollout import self_rollout

MINIMISED = "minimised"  # among the figures of a part; not logged
HELD_OUT = (0, 3)  # step and use of the held-out clips' random numbers


class RefinerStage:
    """State of a training: the factors and their average, and the objective's.

    `encode` turns prompts into contexts [B, L, text_dim]; `show` draws and scores the average, as a
    loop's stage does. `held_out` are prompts that are not trained on, on which refined clips are
    compared with the base's.
    """

    def __init__(
        self, options: RefineOptions, base: CausalWan, objective: Objective, prompts: Sequence[str],
        encode: Callable[[list[str]], Tensor], show: Callable[["RefinerStage", Path, int], dict[str, float]],
        held_out: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.options, self.objective, self.prompts, self.held_out = (
            options,
            objective,
            prompts,
            held_out,
        )
        self.encode, self._show = encode, show
        self.device = next(base.model.parameters()).device
        base = for_training(base, self.device, options.compiled)
        self.base = replace(base, checkpointing=options.checkpointing)
        even = world() * (2 if options.antithetic else 1)
        if options.batch % even:
            raise ValueError(
                f"a batch of {options.batch} in {world()} processes: give a multiple of {even}"
            )
        tree = attach_branches(
            self.base,
            options.rank,
            silent_head=options.method != "lora",
            start=options.start,
            seed=options.seed,
        )
        self.tree, self.base = sharded(tree), sharded(self.base)
        self.factors = branch_parameters(self.tree)
        self.learner = Learner(
            nn.ParameterList(self.factors.values()),
            options.learning_rate,
            options.ema,
            options.betas,
        )
        self.replay = Replay(
            self.learner.model, self.device, eager=not replayable(options, self.base), adds=True
        )
        self.first_half = FirstHalf()
        self.signal = Signal()

    def allocate(self) -> None:
        """Bring the optimisers' state to where it can be read in place."""
        for learner in (self.learner, *self.objective.learners):
            learner.allocate()

    def state_dict(self) -> dict:
        return {
            "factors": self.learner.state_dict(),
            **self.objective.state_dict(),
            **self.first_half.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.learner.load_state_dict(state["factors"])
        self.objective.load_state_dict(state)
        self.first_half.load_state_dict(state)

    def step(self, index: int) -> dict[str, float]:
        logged = self.first_half.take(
            index, lambda: self.objective.prepare(index, self._samples(index))
        )
        since = index - self.options.first_update
        if since >= 0 and since % self.objective.ratio == 0:
            logged |= self._teach(index, since // self.objective.ratio)
        self.first_half.clear()
        return logged

    def show(self, folder: Path, index: int) -> dict[str, float]:
        return self._show(self, folder, index) | self.compare()

    @torch.no_grad()
    def compare(self) -> dict[str, float]:
        """`held-out`: by how much the factors as they stand improve on the base, with held-out
        prompts and the same noise, by the objective's own measure. Nothing where no prompts are
        held out."""
        if not self.held_out:
            return {}
        exit_level, prompts = max(self.options.exits), tuple(self.held_out)
        (index, use), count = HELD_OUT, len(prompts)
        seed = int(stream(self.options.seed, index, use).integers(1 << 62))
        noise, rows = WhiteNoise(seed), slice(0, count)
        part = self._part(
            prompts, noise, exit_level, rows, index=index, use=use, total=count, weight=1.0
        )
        before, after = (
            self._clips(part.path, part.context, exit_level, base=base)[0] for base in (True, False)
        )
        return {"held-out": self.objective.improvement(before, after, part)}

    def average(self) -> dict[str, LoraPair]:
        """The average factors by layer."""
        return pairs_of(self.tree, dict(zip(self.factors, self.learner.average, strict=True)))

    def refiner(self, residuals: Residuals | None = None) -> Refiner | None:
        """T_φ as it stands, with its graph; None where the branches are the base's own."""
        if self.options.method == "lora":
            return None
        return Refiner(self.tree, self.options.cache, self.options.refined, watch=residuals)

    def gradient(self, index: int) -> Means:
        """Accumulate the gradient of a step's clips in the factors; returns the figures to log."""
        self.learner.zero_grad()
        means = Means()
        for part in self._parts(index, use=1):
            tensors, others = self.objective.given(part)
            fixed = {"exit_level": part.exit_level, "weight": part.weight, **others}
            figures = self.replay(self._loss, part.path, part.context, *tensors, **fixed)
            means.add(
                {name: figure for name, figure in figures.items() if name != MINIMISED}, part.weight
            )
        return means

    def _teach(self, index: int, update: int) -> dict[str, float]:
        """Update the factors once, along the gradient of the step's clips."""
        means = self.gradient(index)
        means.add(self.signal.compare([factor.grad for factor in self.factors.values()]), 1.0)
        logged = means.floats()
        self.learner.update(update, self.options.rate_factor(update), clip=None)
        return logged

    def _loss(
        self,
        path: Tensor,
        context: Tensor,
        *tensors: Tensor,
        exit_level: int,
        weight: float,
        **others: Hashable,
    ) -> dict[str, Tensor]:
        """Of a part, by its weight, and what is logged of the part."""
        residuals = Residuals()
        (clean,) = self._clips(path, context, exit_level, residuals)
        loss, figures = self.objective.loss(clean, context, residuals, *tensors, **others)
        return {MINIMISED: weight * loss, **figures, **residuals.figures()}

    def _samples(self, index: int) -> Iterator[tuple[Part, Tensor]]:
        """The parts of what the objective itself learns from, and their clips [B, C, F, h, w]."""
        for part in self._parts(index, use=0):
            (clean,) = self.replay.forward(
                self._clips, part.path, part.context, exit_level=part.exit_level
            )
            yield part, clean

    def _clips(
        self,
        path: Tensor,
        context: Tensor,
        exit_level: int,
        residuals: Residuals | None = None,
        base: bool = False,
    ) -> tuple[Tensor]:
        """Clips [B, C, F, h, w] along a path of noises [levels, B, C, F, h, w]; with `base`,
        without any branches."""
        first_graph = 0 if self.options.method == "init-noise" else None
        with mixed_precision(self.device, self.options.precision):
            noise = GivenNoise(path, self.options.preset.all_levels[: len(path)])
            rollout = self.rollout(
                context, noise, None if base else self.refiner(residuals), base=base
            )
            return (self_rollout(rollout, exit_level, first_graph),)

    def _parts(self, index: int, use: int) -> Iterator[Part]:
        """This process's share of the step's clips, part by part; what is drawn for a clip is the
        same in any parts."""
        options, total = self.options, self.options.batch * self.options.accumulation
        rng = stream(options.seed, index, use)
        alike = 2 if options.antithetic else 1
        drawn = rng.integers(len(self.prompts), size=-(-total // alike))
        prompts = tuple(self.prompts[drawn[row // alike]] for row in range(total))
        seed, exit_level = int(rng.integers(1 << 62)), int(rng.choice(options.exits))
        share = options.batch // world()
        for start in range(rank() * share, total, options.batch):
            rows, weight = slice(start, start + share), options.batch / total
            noise = WhiteNoise(seed, start // alike)
            if options.antithetic:
                noise = AntitheticNoise(noise)
            yield self._part(
                prompts[rows],
                noise,
                exit_level,
                rows,
                index=index,
                use=use,
                total=total,
                weight=weight,
            )

    def _part(
        self, prompts: tuple[str, ...], noise: NoiseSource, exit_level: int, rows: slice, *, index: int, use: int,
        total: int, weight: float,
    ) -> Part:  # fmt: skip
        """Prompts and noises of some of a step's clips."""
        options = self.options
        chunks = plan_chunks(options.preset, options.frames)[1]
        last = chunks[-1].levels[exit_level].step
        frame_shape = (len(prompts), self.base.config.in_dim, options.height, options.width)
        path = GivenNoise.of(noise, chunks, frame_shape, last).noise
        with torch.no_grad(), mixed_precision(self.device, options.precision):
            context = self.encode([*prompts])
        path = upload(path, self.device, torch.float32)
        return Part(path, exit_level, context, prompts, index, use, rows, total, weight)

    def rollout(
        self, context: Tensor, noise: NoiseSource, refiner: Refiner | None, base: bool = False
    ) -> Rollout:
        """A rollout of the path with these prompts' contexts [B, L, text_dim]; that of the `base`
        has no branches."""
        options = self.options
        network = self.tree if options.method == "lora" and not base else self.base
        plan = RunPlan(
            options.preset, options.frames, options.height, options.width, batch=len(context)
        )
        return Rollout.of(
            network, context, plan, noise, memory=GraphMemory, refiner=refiner, device=self.device,
            dtype=torch.float32,
        )  # fmt: skip
