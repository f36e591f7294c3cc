"""The causal student, a fifth of its teacher's size, made in two stages.

First teacher forcing: flow matching of one noised chunk at a time after clean history, at the
sampler's levels and between them. Then Self-Forcing: distribution matching against the teacher on
the student's rollouts, with the objective of a refiner's training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory.graph import GraphMemory
from ...memory.plan import MemoryPlan
from ...noise.source import GivenNoise
from ...rollout import Rollout, add_noise
from ...run_plan import RunPlan
from ...schedule import plan_chunks
from ...training.ahead import Ahead, helpers
from ...training.dmd import column, draw_sigma, shifted
from ...training.dmd_objective import BETAS, DmdObjective
from ...training.learner import FirstHalf, Learner, LearnerStage, noise_stream, stream, warm_cosine
from ...training.objective import MicroBatch
from ...training.options import RefineOptions
from ...training.precision import for_training, mixed_precision
from ...training.replay import Replay
from ...training.residuals import Residuals
from ...training.self_rollout import self_rollout
from ...wan.causal import CausalWan, KeyValue
from ...wan.vae import WanVAE
from ..clips import PRESET, held_out, show_clips, student_clips
from ..text_encoder import SpriteTextEncoder
from .data import Clips
from .teacher import TEXT_WAY, new_model, sprite_config, twin


@dataclass(frozen=True, slots=True)
class InitOptions:
    """Causal initialisation, from random weights."""

    width: int = 128
    steps: int = 1800
    batch: int = 32
    learning_rate: float = 1e-3
    muon: float = 2e-2
    ema: float = 0.995
    shown: int = 32  # held-out captions of a sample sheet's scores
    at_levels: float = 0.5  # share of chunks noised at one of the sampler's levels
    seed: int = 0
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class DistilOptions:
    """Distillation: the critic learns every step, the generator every `ratio`-th."""

    steps: int = 990
    batch: int = 32
    learning_rate: float = 3e-4
    critic_rate: float = 1e-4
    ema: float = 0.99
    ratio: int = 2
    shown: int = 32
    guidance: float = 1.0  # of the real score
    seed: int = 0
    compiled: bool = False

    @property
    def objective(self) -> RefineOptions:
        """The objective's options, in the form of a refiner's training."""
        return RefineOptions(
            steps=self.steps, batch=self.batch, accumulation=1, ratio=self.ratio,
            critic_rate=self.critic_rate, guidance=self.guidance, preset=PRESET, seed=self.seed,
            compiled=self.compiled,
        )  # fmt: skip


CLIP = 10.0  # largest norm of the distillation's gradients


def graph_memory(network: CausalWan, shape: torch.Size) -> GraphMemory:
    return GraphMemory(MemoryPlan.of(network.config, tuple(shape)))


class CausalInitStage(LearnerStage):
    """Training state of the causal initialisation."""

    def __init__(
        self, options: InitOptions, clips: Clips, text: SpriteTextEncoder, vae: WanVAE,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.options, self.clips, self.text, self.vae = options, clips, text, vae
        self.device = device
        config = sprite_config(options.width, text)
        model = new_model(config, options.seed).to(self.device)
        self.learner = Learner(
            model, options.learning_rate, options.ema, muon=options.muon, spared=TEXT_WAY
        )
        self.network = for_training(CausalWan(model, config), self.device, options.compiled)
        self.average = CausalWan(self.learner.average, config)
        self.replay = Replay(self.learner.model, self.device)
        self.batches = Ahead(
            partial(init_batch, options, clips), options.steps, helpers(self.device)
        )

    def step(self, index: int) -> dict[str, float]:
        options = self.options
        clean, prompts = self.batches(index)
        clean = clean.to(self.device).float()
        generator = noise_stream(self.device, options.seed, index, 1)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        sigma = self._levels(len(clean), generator)
        with torch.no_grad():
            context = self.text(prompts)
        (loss,) = self.replay(self._loss, clean, noise, sigma, context)
        self.learner.update(index, warm_cosine(index, options.steps))
        return {"loss": loss.item()}

    def _loss(self, clean: Tensor, noise: Tensor, sigma: Tensor, context: Tensor) -> tuple[Tensor]:
        with mixed_precision(self.device):
            losses = list(self._chunk_losses(clean, noise, sigma, self.network.text(context)))
        return (torch.stack(losses).mean(),)

    def _chunk_losses(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, text: list[KeyValue]
    ) -> Iterator[Tensor]:
        """Yield the flow-matching loss of each chunk, given its clean history.

        Gradients also flow through the history's keys and values. A chunk's noise level is that of
        its first frame in `sigma` [B, F].
        """
        memory = graph_memory(self.network, clean.shape)
        _, chunks = plan_chunks(PRESET, clean.shape[2])
        for chunk in chunks:
            frames = slice(chunk.start, chunk.start + chunk.length)
            chunk_x0, chunk_noise = clean[:, :, frames], noise[:, :, frames]
            chunk_sigma = sigma[:, chunk.start]
            noisy = add_noise(chunk_x0, chunk_noise, column(chunk_sigma))
            flow = self.network(noisy, 1000 * chunk_sigma[:, None], text, memory.view(chunk.frames))
            yield F.mse_loss(flow.float(), chunk_noise - chunk_x0)
            if chunk is not chunks[-1]:
                zero = torch.zeros(1, 1, dtype=torch.float64)
                self.network(chunk_x0, zero, text, memory.view(chunk.frames), keys_only=True)
                memory.commit()

    def _levels(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw a sigma for each sample and frame [B, F]: one of the sampler's, or any."""
        levels = torch.tensor([level.sigma for level in PRESET.chunk_levels()], device=self.device)
        u = torch.rand(
            3, batch, self.clips.latents.shape[2], generator=generator, device=self.device
        )
        chosen = levels[(u[1] * len(levels)).long()]
        return torch.where(u[0] < self.options.at_levels, chosen, shifted(u[2], PRESET.shift))

    def show(self, folder: Path, index: int) -> dict[str, float]:
        captions = held_out(self.options.shown)
        return show_clips(
            student_clips(self.average, self.text, self.vae, captions), captions, folder, index
        )


class DistilStage:
    """Training state of the distillation: the generator, its average, and the objective's networks.

    The objective is that of a refiner's training, but the whole student is trained.
    """

    def __init__(
        self, options: DistilOptions, student: CausalWan, teacher: CausalWan, clips: Clips,
        text: SpriteTextEncoder, vae: WanVAE,
    ) -> None:  # fmt: skip
        self.options, self.clips, self.text, self.vae = options, clips, text, vae
        rates = options.learning_rate, options.ema
        self.generator = Learner(twin(student), *rates, BETAS, decay=0.01)
        self.device = next(self.generator.model.parameters()).device
        network = CausalWan(self.generator.model, student.config)
        self.network = for_training(network, self.device, options.compiled)
        self.average = CausalWan(self.generator.average, student.config)
        self.objective = DmdObjective(options.objective, teacher, self._encode, CLIP)
        self.replay = Replay(self.generator.model, self.device)
        draw = partial(distil_prompts, options, clips)
        self.prompts = Ahead(draw, options.steps, helpers(self.device))
        self.first_half = FirstHalf()

    def state_dict(self) -> dict:
        states = {"generator": self.generator.state_dict(), **self.objective.state_dict()}
        return states | self.first_half.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.generator.load_state_dict(state["generator"])
        self.objective.load_state_dict(state)
        self.first_half.load_state_dict(state)

    def step(self, index: int) -> dict[str, float]:
        """Update the critic every step and the generator every `ratio`-th."""
        for_critic, for_generator = self.prompts(index)
        logged = self.first_half.take(index, lambda: self._teach_critic(index, for_critic))
        if index % self.options.ratio == 0:
            logged["generator"] = self._teach_generator(index, for_generator)
        self.first_half.clear()
        return logged

    def _teach_critic(self, index: int, prompts: list[str]) -> dict[str, float]:
        batch = self._batch(index, 0, prompts)
        fixed = {"exit_level": batch.exit_level}
        (clean,) = self.replay.forward(self._clips_of, batch.path, batch.context, **fixed)
        return self.objective.prepare(index, iter([(batch, clean)]))

    def _teach_generator(self, index: int, prompts: list[str]) -> float:
        """Update the generator; returns the mean size of its loss's gradient."""
        batch = self._batch(index, 1, prompts)
        tensors, _ = self.objective.loss_arguments(batch)
        fixed = {"exit_level": batch.exit_level}
        _, size = self.replay(self._generator_loss, batch.path, batch.context, *tensors, **fixed)
        self.generator.update(index // self.options.ratio, 1.0, clip=CLIP)
        return size.item()

    def _batch(self, index: int, use: int, prompts: list[str]) -> MicroBatch:
        """Draw a step's exit level, the noises of its clips' path, and those to score them at."""
        options, shape = self.options, (len(prompts), *self.clips.latents.shape[1:])
        exit_level = int(stream(options.seed, index, use, 2).integers(len(PRESET.levels)))
        generator = noise_stream(self.device, options.seed, index, use, 1)
        path, noise = (
            torch.randn(size, generator=generator, device=self.device)
            for size in ((len(PRESET.levels), *shape), shape)
        )
        sigma = draw_sigma(len(prompts), self.objective.options.dmd, generator)
        return MicroBatch(
            path, exit_level, self._encode(prompts), tuple(prompts), index, use,
            rows=slice(0, len(prompts)), total=len(prompts), weight=1.0,
            scored_at=(noise[None], sigma[None]),
        )  # fmt: skip

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        """Encode prompts as contexts [B, L, text_dim], always in fp32."""
        with torch.autocast(self.device.type, enabled=False):
            return self.text(prompts)

    def _generator_loss(
        self, path: Tensor, context: Tensor, *tensors: Tensor, exit_level: int
    ) -> tuple[Tensor, Tensor]:
        (clean,) = self._clips_of(path, context, exit_level)
        loss, figures = self.objective.loss(clean, context, Residuals(), *tensors)
        return loss, figures["gradient"]

    def _clips_of(self, path: Tensor, context: Tensor, exit_level: int) -> tuple[Tensor]:
        with mixed_precision(self.device):
            return (self._rollout(path, context, exit_level),)

    def _rollout(self, path: Tensor, context: Tensor, exit_level: int) -> Tensor:
        """Sample the student's clips along a path of noises [levels, B, 16, F, h, w]."""
        batch, _, frames, height, width = path.shape[1:]
        plan = RunPlan(PRESET, frames, height, width, batch)
        rollout = Rollout.of(
            self.network, context, plan, GivenNoise(path, PRESET.levels), memory=GraphMemory,
            device=self.device, dtype=torch.float32,
        )  # fmt: skip
        return self_rollout(rollout, exit_level)

    def show(self, folder: Path, index: int) -> dict[str, float]:
        captions = held_out(self.options.shown)
        return show_clips(
            student_clips(self.average, self.text, self.vae, captions), captions, folder, index
        )


def init_batch(options: InitOptions, clips: Clips, index: int) -> tuple[Tensor, list[str]]:
    """Draw a step's latents [B, 16, F, h, w], in bf16, and their prompts."""
    return clips.batch(stream(options.seed, index, 0), options.batch, unsaid=0.1)


def distil_prompts(options: DistilOptions, clips: Clips, index: int) -> tuple[list[str], list[str]]:
    """Draw a step's prompts for the critic and for the generator."""
    critic, generator = (
        clips.texts(stream(options.seed, index, use), options.batch) for use in (0, 1)
    )
    return critic, generator
