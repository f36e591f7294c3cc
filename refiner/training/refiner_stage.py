"""Training of a noise refiner (AutoRefiner, Algorithm 1) and of its controls.

`autorefiner` trains T_φ on the path's noises, `init-noise` T_φ on the initial noise alone, `lora`
plain branches on the base: one loop, one objective, one budget.
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
from .objective import Means, MicroBatch, Objective
from .options import RefineOptions
from .precision import for_training, mixed_precision
from .replay import Replay, replayable
from .residuals import Residuals
from .self_rollout import self_rollout

MINIMISED = "minimised"  # the weighted loss among a micro-batch's figures; not logged
HELD_OUT = (0, 3)  # step and use of the held-out clips' random numbers


class RefinerStage:
    """Training state: the factors, their average, and the objective's networks.

    `encode` maps prompts to contexts [B, L, text_dim]; `show` draws and scores the average (see
    Stage.show). Refined clips are compared with the base's on the `held_out` prompts, which are
    not trained on.
    """

    def __init__(
        self, options: RefineOptions, base: CausalWan, objective: Objective, prompts: Sequence[str],
        encode: Callable[[list[str]], Tensor],
        show: Callable[["RefinerStage", Path, int], dict[str, float]],
        held_out: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.options, self.objective = options, objective
        self.prompts, self.held_out = prompts, held_out
        self.encode, self._show = encode, show
        self.device = next(base.model.parameters()).device
        base = for_training(base, self.device, options.compiled)
        self.base = replace(base, checkpointing=options.checkpointing)
        divisor = world() * (2 if options.antithetic else 1)
        if options.batch % divisor:
            raise ValueError(
                f"a batch of {options.batch} in {world()} processes: give a multiple of {divisor}"
            )
        tree = attach_branches(
            self.base, options.rank, silent_head=options.method != "lora", start=options.start,
            flow_share=options.flow_share, seed=options.seed,
        )  # fmt: skip
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
        """Allocate the optimisers' states, so that they can be loaded in place."""
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
    def compare(self, residuals: Residuals | None = None) -> dict[str, float]:
        """Return `held-out`, the current factors' improvement on the base on held-out prompts.

        By the objective's measure, with the same noise, at all levels that are refined. Empty if no
        prompts are held out. `residuals` collects those of the refined clips.
        """
        if not self.held_out:
            return {}
        exit_level, prompts = max(self.options.exits), tuple(self.held_out)
        (index, use), count = HELD_OUT, len(prompts)
        seed = int(stream(self.options.seed, index, use).integers(1 << 62))
        noise, rows = WhiteNoise(seed), slice(0, count)
        batch = self._micro_batch(
            prompts, noise, exit_level, rows, index=index, use=use, total=count, weight=1.0
        )
        (before,) = self._clips(batch.path, batch.context, exit_level, base=True)
        (after,) = self._clips(batch.path, batch.context, exit_level, residuals)
        return {"held-out": self.objective.improvement(before, after, batch)}

    def average(self) -> dict[str, LoraPair]:
        """Return the averaged factors by layer."""
        return pairs_of(self.tree, dict(zip(self.factors, self.learner.average, strict=True)))

    def refiner(self, residuals: Residuals | None = None) -> Refiner | None:
        """Return the current T_φ with its graph; None for method lora."""
        if self.options.method == "lora":
            return None
        return Refiner(self.tree, self.options.cache, self.options.refined, watch=residuals)

    def gradient(self, index: int) -> Means:
        """Accumulate the gradient of a step's clips in the factors; returns the figures to log."""
        self.learner.zero_grad()
        means = Means()
        for batch in self._micro_batches(index, use=1):
            tensors, others = self.objective.loss_arguments(batch)
            fixed = {"exit_level": batch.exit_level, "weight": batch.weight, **others}
            figures = self.replay(self._loss, batch.path, batch.context, *tensors, **fixed)
            logged = {name: figure for name, figure in figures.items() if name != MINIMISED}
            means.add(logged, batch.weight)
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
        """Return a micro-batch's weighted loss and its figures to log."""
        residuals = Residuals()
        (clean,) = self._clips(path, context, exit_level, residuals)
        loss, figures = self.objective.loss(clean, context, residuals, *tensors, **others)
        return {MINIMISED: weight * loss, **figures, **residuals.figures()}

    def _samples(self, index: int) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Yield the objective's micro-batches with their clips [B, C, F, h, w]."""
        for batch in self._micro_batches(index, use=0):
            (clean,) = self.replay.forward(
                self._clips, batch.path, batch.context, exit_level=batch.exit_level
            )
            yield batch, clean

    def _clips(
        self,
        path: Tensor,
        context: Tensor,
        exit_level: int,
        residuals: Residuals | None = None,
        base: bool = False,
    ) -> tuple[Tensor]:
        """Sample clips [B, C, F, h, w] along noises [levels, B, C, F, h, w].

        With `base`, without any branches.
        """
        first_graph = 0 if self.options.method == "init-noise" else None
        with mixed_precision(self.device, self.options.precision):
            noise = GivenNoise(path, self.options.preset.all_levels[: len(path)])
            rollout = self.rollout(
                context, noise, None if base else self.refiner(residuals), base=base
            )
            return (self_rollout(rollout, exit_level, first_graph),)

    def _micro_batches(self, index: int, use: int) -> Iterator[MicroBatch]:
        """Yield this process's micro-batches of a step.

        Each clip's draws are the same however the step is split.
        """
        options, total = self.options, self.options.batch * self.options.accumulation
        rng = stream(options.seed, index, use)
        group = 2 if options.antithetic else 1  # clips of one prompt
        drawn = rng.integers(len(self.prompts), size=-(-total // group))
        prompts = tuple(self.prompts[drawn[row // group]] for row in range(total))
        seed, exit_level = int(rng.integers(1 << 62)), int(rng.choice(options.exits))
        share = options.batch // world()
        for start in range(rank() * share, total, options.batch):
            rows, weight = slice(start, start + share), options.batch / total
            noise = WhiteNoise(seed, start // group)
            if options.antithetic:
                noise = AntitheticNoise(noise)
            yield self._micro_batch(
                prompts[rows], noise, exit_level, rows, index=index, use=use, total=total,
                weight=weight,
            )  # fmt: skip

    def _micro_batch(
        self, prompts: tuple[str, ...], noise: NoiseSource, exit_level: int, rows: slice, *,
        index: int, use: int, total: int, weight: float,
    ) -> MicroBatch:  # fmt: skip
        """Encode the prompts and draw the noises of some of a step's clips."""
        options = self.options
        chunks = plan_chunks(options.preset, options.frames)[1]
        last = chunks[-1].levels[exit_level].step
        frame_shape = (len(prompts), self.base.config.in_dim, options.height, options.width)
        path = GivenNoise.of(noise, chunks, frame_shape, last).noise
        with torch.no_grad(), mixed_precision(self.device, options.precision):
            context = self.encode([*prompts])
        path = upload(path, self.device, torch.float32)
        return MicroBatch(path, exit_level, context, prompts, index, use, rows, total, weight)

    def rollout(
        self, context: Tensor, noise: NoiseSource, refiner: Refiner | None, base: bool = False
    ) -> Rollout:
        """Start a rollout with contexts [B, L, text_dim]; with `base`, without any branches."""
        options = self.options
        network = self.tree if options.method == "lora" and not base else self.base
        plan = RunPlan(
            options.preset, options.frames, options.height, options.width, batch=len(context)
        )
        return Rollout.of(
            network, context, plan, noise, memory=GraphMemory, refiner=refiner,
            device=self.device, dtype=torch.float32,
        )  # fmt: skip
