"""The causal student: the teacher's weights taught to work chunk by chunk, then distilled on its own rollouts.

First teacher forcing: clean history, one noised chunk at a time, flow matching at the four levels and between. Then
Self-Forcing: self-rollout with distribution matching against the teacher (refiner/training/dmd.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory.graph import GraphMemory
from ...memory.plan import MemoryPlan
from ...noise.source import WhiteNoise
from ...rollout import Rollout, add_noise
from ...schedule import plan_chunks
from ...training.dmd import DmdOptions, column, critic_loss, dmd_gradient, dmd_loss, draw_sigma, shifted
from ...training.learner import Learner, LearnerStage, noise_stream, stream, warm_cosine
from ...training.precision import mixed_precision, training_host
from ...training.self_rollout import self_rollout
from ...wan.causal import CausalWan, KeyValue
from ...wan.transformer import WanTransformer
from ...wan.vae import WanVAE
from ..clips import PRESET, held_out, show_clips, student_clips
from ..text_encoder import SpriteTextEncoder
from .data import Clips
from .teacher import TEXT_WAY


@dataclass(frozen=True, slots=True)
class InitOptions:
    """Of the causal initialisation."""

    steps: int = 1000
    batch: int = 16
    learning_rate: float = 5e-4
    muon: float = 5e-3
    ema: float = 0.995
    shown: int = 32  # held-out captions of a sample sheet's scores
    at_levels: float = 0.5  # share of chunks noised at one of the sampler's levels; the others anywhere
    seed: int = 0
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class DistilOptions:
    """Of the distillation; the critic learns every step, the generator every `ratio`-th."""

    steps: int = 1500
    batch: int = 16
    learning_rate: float = 1e-4
    critic_rate: float = 1e-4
    ema: float = 0.99
    ratio: int = 5
    shown: int = 32
    dmd: DmdOptions = field(default_factory=lambda: DmdOptions(guidance=1.0))
    seed: int = 0
    compiled: bool = False


def twin(network: CausalWan) -> WanTransformer:
    """A trainable copy of a network's weights."""
    model = WanTransformer(network.config)
    model.load_state_dict(network.model.state_dict())
    return model.to(next(network.model.parameters()).device)


def graph_memory(network: CausalWan, shape: torch.Size) -> GraphMemory:
    return GraphMemory(MemoryPlan.of(network.config, tuple(shape)))


class CausalInitStage(LearnerStage):
    """Training state of the causal initialisation."""

    def __init__(
        self, options: InitOptions, teacher: CausalWan, clips: Clips, text: SpriteTextEncoder, vae: WanVAE
    ) -> None:
        self.options, self.clips, self.text, self.vae = options, clips, text, vae
        self.device = next(teacher.model.parameters()).device
        self.learner = Learner(twin(teacher), options.learning_rate, options.ema, muon=options.muon, spared=TEXT_WAY)
        host = training_host(self.device, options.compiled)
        self.network = CausalWan(self.learner.model, teacher.config, host)
        self.average = CausalWan(self.learner.average, teacher.config)

    def step(self, index: int) -> dict[str, float]:
        options = self.options
        clean, prompts = self.clips.batch(stream(options.seed, index, 0), options.batch, unsaid=0.1)
        generator = noise_stream(self.device, options.seed, index, 1)
        with torch.no_grad():
            context = self.text(prompts)
        with mixed_precision(self.device):
            losses = list(self._chunk_losses(clean.to(self.device), self.network.text(context), generator))
        loss = torch.stack(losses).mean()
        self.learner.step(loss, index, warm_cosine(index, options.steps))
        return {"loss": loss.item()}

    def _chunk_losses(self, clean: Tensor, text: list[KeyValue], generator: torch.Generator) -> Iterator[Tensor]:
        """Flow-matching loss of each chunk behind its clean history, whose keys and values have a graph, too."""
        memory = graph_memory(self.network, clean.shape)
        _, chunks = plan_chunks(PRESET, clean.shape[2])
        for chunk in chunks:
            part = clean[:, :, chunk.start : chunk.start + chunk.length]
            noise = torch.randn(part.shape, generator=generator, device=self.device)
            sigma = self._levels(len(clean), generator)
            noisy = add_noise(part, noise, column(sigma))
            flow = self.network(noisy, 1000 * sigma[:, None], text, memory.view(chunk.frames))
            yield F.mse_loss(flow.float(), noise - part)
            if chunk is not chunks[-1]:
                zero = torch.zeros(1, 1, device=self.device)
                self.network(part, zero, text, memory.view(chunk.frames), keys_only=True)
                memory.commit()

    def _levels(self, batch: int, generator: torch.Generator) -> Tensor:
        """A sigma for each sample [B]: one of the sampler's, or any."""
        levels = torch.tensor([level.sigma for level in PRESET.levels()], device=self.device)
        u = torch.rand(3, batch, generator=generator, device=self.device)
        chosen = levels[(u[1] * len(levels)).long()]
        return torch.where(u[0] < self.options.at_levels, chosen, shifted(u[2], PRESET.shift))

    def show(self, folder: Path, index: int) -> dict[str, float]:
        captions = held_out(self.options.shown)
        return show_clips(student_clips(self.average, self.text, self.vae, captions), captions, folder, index)


class DistilStage:
    """Training state of the distillation: generator, its average, fake network, and the frozen teacher."""

    def __init__(
        self, options: DistilOptions, student: CausalWan, teacher: CausalWan, clips: Clips, text: SpriteTextEncoder,
        vae: WanVAE,
    ) -> None:  # fmt: skip
        self.options, self.clips, self.text, self.vae = options, clips, text, vae
        betas = (0.0, 0.999)
        self.generator = Learner(twin(student), options.learning_rate, options.ema, betas, decay=0.01)
        self.critic = Learner(twin(teacher), options.critic_rate, 0.0, betas, decay=0.01)
        self.device = next(self.generator.model.parameters()).device
        host = training_host(self.device, options.compiled)
        self.network = CausalWan(self.generator.model, student.config, host)
        self.average = CausalWan(self.generator.average, student.config)
        self.fake = CausalWan(self.critic.model, teacher.config, host)
        self.teacher = CausalWan(teacher.model, teacher.config, host)

    def state_dict(self) -> dict:
        return {"generator": self.generator.state_dict(), "critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])

    def step(self, index: int) -> dict[str, float]:
        logged = {"loss": self._teach_critic(index)}
        if index % self.options.ratio == 0:
            logged["generator"] = self._teach_generator(index)
        return logged

    def _teach_critic(self, index: int) -> float:
        with mixed_precision(self.device):
            with torch.no_grad():
                clean, context, generator = self._rollout(index, use=0)
                noise, sigma = self._noise(clean, generator)
            loss = critic_loss(self.fake, clean, noise, sigma, self.fake.text(context))
        self.critic.step(loss, index, 1.0, clip=10.0)
        return loss.item()

    def _teach_generator(self, index: int) -> float:
        with mixed_precision(self.device):
            clean, context, generator = self._rollout(index, use=1)
            noise, sigma = self._noise(clean, generator)
            with torch.no_grad():
                nothing = self.text([""] * len(clean))
                texts = self.teacher.text(context), self.teacher.text(nothing), self.fake.text(context)
            gradient = dmd_gradient(
                clean.detach(), noise, sigma, self.teacher, self.fake, texts, self.options.dmd.guidance
            )
        loss = dmd_loss(clean, gradient)
        self.generator.step(loss, index // self.options.ratio, 1.0, clip=10.0)
        return gradient.abs().mean().item()

    def _rollout(self, index: int, use: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """The student's own clips [B, 16, F, h, w], stopped at one level for all; the context they were asked for."""
        options = self.options
        rng = stream(options.seed, index, use)
        shape, prompts = self.clips.latents.shape[1:], self.clips.batch(rng, options.batch, unsaid=0.0)[1]
        with torch.no_grad():
            context = self.text(prompts)
        rollout = Rollout(
            network=self.network,
            text=self.network.text(context),
            memory=graph_memory(self.network, torch.Size((options.batch, *shape))),
            noise=WhiteNoise(int(rng.integers(1 << 62))),
            chunks=plan_chunks(PRESET, shape[1])[1],
            frame_shape=(options.batch, shape[0], *shape[2:]),
            device=self.device,
            network_dtype=torch.float32,
        )
        clean = self_rollout(rollout, exit_level=int(rng.integers(len(PRESET.steps))))
        return clean, context, noise_stream(self.device, options.seed, index, use, 1)

    def _noise(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        return noise, draw_sigma(len(clean), self.options.dmd, generator)

    def show(self, folder: Path, index: int) -> dict[str, float]:
        captions = held_out(self.options.shown)
        return show_clips(student_clips(self.average, self.text, self.vae, captions), captions, folder, index)
