"""Distribution matching as an objective: the frozen real network, and the fake one that learns
along (AutoRefiner, eq. 5; refiner/training/dmd.py has the arithmetic)."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..wan.causal import CausalWan
from ..wan.transformer import WanTransformer
from .distributed import sharded
from .dmd import critic_loss, dmd_gradient, dmd_loss, draw_sigma, real_prediction
from .learner import Learner, noise_stream
from .objective import Means, Part
from .options import RefineOptions
from .precision import for_training, mixed_precision
from .replay import Replay, replayable
from .residuals import Residuals

BETAS = (0.0, 0.999)


class DmdObjective:
    """State: the fake network. `encode` turns prompts into contexts [B, L, text_dim].

    `critic_clip` limits the norm of the critic's gradient; None: 4 times the usual norm.
    """

    def __init__(
        self, options: RefineOptions, teacher: CausalWan, encode: Callable[[list[str]], Tensor],
        critic_clip: float | None = None,
    ) -> None:  # fmt: skip
        self.options, self.encode, self.ratio = options, encode, options.ratio
        self.critic_clip = critic_clip
        self.device = next(teacher.model.parameters()).device
        fake = WanTransformer(teacher.config)
        fake.load_state_dict(teacher.model.state_dict())
        self.teacher = sharded(for_training(teacher, self.device, options.compiled))
        self.fake = sharded(
            replace(self.teacher, model=fake.to(self.device), checkpointing=options.checkpointing)
        )
        self.critic = Learner(self.fake.model, options.critic_rate, 0.0, BETAS, decay=0.01)
        self.learners = [self.critic]
        self.replay = Replay(
            self.fake.model, self.device, eager=not replayable(options, self.fake), adds=True
        )

    def state_dict(self) -> dict:
        return {"critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.critic.load_state_dict(state["critic"])

    def prepare(self, index: int, samples: Iterator[tuple[Part, Tensor]]) -> dict[str, float]:
        """Update the fake network on the path's own clips."""
        self.critic.zero_grad()
        means = Means()
        for part, clean in samples:
            tensors = (clean, *self._noised(part), part.context)
            _, loss = self.replay(self._critic_loss, *tensors, weight=part.weight)
            means.add({"loss": loss}, part.weight)
        logged = means.floats()
        self.critic.update(index, 1.0, clip=self.critic_clip)
        return logged

    def _critic_loss(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """A part's loss, a mean over draws: weighted, and as it is."""
        with mixed_precision(self.device, self.options.precision):
            text = self.fake.text(context)
            losses = [
                critic_loss(self.fake, clean, *draw, text)
                for draw in zip(noise, sigma, strict=True)
            ]
        loss = torch.stack(losses).mean()
        return weight * loss, loss

    def given(self, part: Part) -> tuple[tuple[Tensor, ...], dict]:
        """No prompt's context, and what the clips are noised with."""
        with torch.no_grad(), mixed_precision(self.device, self.options.precision):
            nothing = self.encode([""] * len(part.prompts))
        return (nothing, *self._noised(part)), {}

    def loss(
        self,
        clean: Tensor,
        context: Tensor,
        residuals: Residuals,
        nothing: Tensor,
        noise: Tensor,
        sigma: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See dmd_loss; logged is the size of the gradient."""
        gradient = self._gradient(clean, context, nothing, noise, sigma)
        return dmd_loss(clean, gradient), {"gradient": gradient.abs().mean()}

    @torch.no_grad()
    def improvement(self, before: Tensor, after: Tensor, part: Part) -> float:
        """How much less the real network changes clips `after` than `before` when it denoises them:
        the difference of mean |clip - prediction|. The fake network has no say: it follows the
        refined clips."""
        (nothing, noise, sigma), _ = self.given(part)
        distances = []
        with mixed_precision(self.device, self.options.precision):
            texts = self.teacher.text(part.context), self.teacher.text(nothing)
            for clean in (before, after):
                for draw in zip(noise, sigma, strict=True):
                    prediction = real_prediction(
                        clean, *draw, self.teacher, texts, self.options.dmd.guidance
                    )
                    distances.append((clean - prediction).abs().mean())
        half = len(distances) // 2
        return (torch.stack(distances[:half]).mean() - torch.stack(distances[half:]).mean()).item()

    @torch.no_grad()
    def _gradient(
        self, clean: Tensor, context: Tensor, nothing: Tensor, noise: Tensor, sigma: Tensor
    ) -> Tensor:
        """The mean of dmd_gradient over draws of noise [N, B, C, F, h, w] and sigma [N, B]."""
        clean, guidance = clean.detach(), self.options.dmd.guidance
        with mixed_precision(self.device, self.options.precision):
            texts = self.teacher.text(context), self.teacher.text(nothing), self.fake.text(context)
            gradients = [
                dmd_gradient(clean, *draw, self.teacher, self.fake, texts, guidance)
                for draw in zip(noise, sigma, strict=True)
            ]
        return torch.stack(gradients).mean(dim=0)

    def _noised(self, part: Part) -> tuple[Tensor, Tensor]:
        """Noises [N, B, C, F, h, w] and sigmas [N, B] to score a part's clips at.

        Drawn for the whole step, of which the part has its rows, unless the part brings them.
        """
        if part.scored_at is not None:
            return part.scored_at
        generator = noise_stream(self.device, self.options.seed, part.index, part.use, 1)
        shape = (part.total, *part.path.shape[2:])
        noises, sigmas = [], []
        for _ in range(self.options.score_draws):
            noises.append(torch.randn(shape, generator=generator, device=self.device)[part.rows])
            sigmas.append(draw_sigma(part.total, self.options.dmd, generator)[part.rows])
        return torch.stack(noises), torch.stack(sigmas)
