"""Distribution matching as an objective: the frozen real network, and the fake one that learns along (AutoRefiner,
eq. 5; refiner/training/dmd.py has the arithmetic)."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..wan.causal import CausalWan
from ..wan.transformer import WanTransformer
from .distributed import sharded
from .dmd import critic_loss, dmd_gradient, dmd_loss, draw_sigma
from .learner import Learner, noise_stream
from .objective import Means, Samples
from .options import RefineOptions
from .precision import mixed_precision, training_host

BETAS = (0.0, 0.999)


class DmdObjective:
    """State: the fake network. `encode` turns prompts into contexts [B, L, text_dim]."""

    def __init__(self, options: RefineOptions, teacher: CausalWan, encode: Callable[[list[str]], Tensor]) -> None:
        self.options, self.encode, self.ratio = options, encode, options.ratio
        self.device = next(teacher.model.parameters()).device
        host = training_host(self.device, options.compiled)
        fake = WanTransformer(teacher.config)
        fake.load_state_dict(teacher.model.state_dict())
        self.teacher = sharded(replace(teacher, host=host))
        self.fake = sharded(CausalWan(fake.to(self.device), teacher.config, host, options.checkpointing))
        self.critic = Learner(self.fake.model, options.critic_rate, 0.0, BETAS, decay=0.01)
        self.learners = [self.critic]

    def state_dict(self) -> dict:
        return {"critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.critic.load_state_dict(state["critic"])

    def prepare(self, index: int, samples: Iterator[Samples]) -> dict[str, float]:
        """A step of the fake network on the path's own clips."""
        self.critic.zero_grad()
        told = Means()
        for part in samples:
            noise, sigma = self._noised(part)
            with mixed_precision(self.device, self.options.precision):
                loss = critic_loss(self.fake, part.clean, noise, sigma, self.fake.text(part.context))
            (part.weight * loss).backward()
            told.add({"loss": loss}, part.weight)
        self.critic.update(index, 1.0, clip=10.0)
        return told.floats()

    def loss(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """See dmd_loss; logged is the size of the gradient."""
        noise, sigma = self._noised(samples)
        clean, context = samples.clean, samples.context
        with torch.no_grad(), mixed_precision(self.device, self.options.precision):
            nothing = self.encode([""] * len(clean))
            texts = self.teacher.text(context), self.teacher.text(nothing), self.fake.text(context)
            guidance = self.options.dmd.guidance
            gradient = dmd_gradient(clean.detach(), noise, sigma, self.teacher, self.fake, texts, guidance)
        return dmd_loss(clean, gradient), {"gradient": gradient.abs().mean()}

    def _noised(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Noise and level to score the samples at: those of their rows in the whole step's."""
        generator = noise_stream(self.device, self.options.seed, samples.index, samples.use, 1)
        shape = (samples.total, *samples.clean.shape[1:])
        noise = torch.randn(shape, generator=generator, device=self.device)
        return noise[samples.rows], draw_sigma(samples.total, self.options.dmd, generator)[samples.rows]
