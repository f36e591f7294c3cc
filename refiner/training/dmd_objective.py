"""Distribution matching as an objective: a frozen real network and a fake one trained online.

AutoRefiner, eq. 5; refiner/training/dmd.py has the arithmetic.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..wan.causal import CausalWan
from ..wan.transformer import WanTransformer
from .distributed import sharded
from .dmd import critic_loss, dmd_gradient, dmd_loss, draw_sigma, real_prediction
from .learner import Learner, noise_stream
from .objective import Means, MicroBatch
from .options import RefineOptions
from .precision import for_training, mixed_precision
from .replay import Replay, replayable
from .residuals import Residuals

BETAS = (0.0, 0.999)


class DmdObjective:
    """Distribution matching; its state is the fake network.

    `encode` maps prompts to contexts [B, L, text_dim]. `critic_clip` limits the norm of the
    critic's gradient; None: 4 times the median of the last updates.
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

    def prepare(self, index: int, samples: Iterator[tuple[MicroBatch, Tensor]]) -> dict[str, float]:
        """Update the fake network on the sampling path's clips."""
        self.critic.zero_grad()
        means = Means()
        for batch, clean in samples:
            tensors = (clean, *self._scoring_noise(batch), batch.context)
            _, loss = self.replay(self._critic_loss, *tensors, weight=batch.weight)
            means.add({"loss": loss}, batch.weight)
        logged = means.floats()
        self.critic.update(index, 1.0, clip=self.critic_clip)
        return logged

    def _critic_loss(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's loss, averaged over draws: weighted and unweighted."""
        with mixed_precision(self.device, self.options.precision):
            text = self.fake.text(context)
            losses = [
                critic_loss(self.fake, clean, *draw, text)
                for draw in zip(noise, sigma, strict=True)
            ]
        loss = torch.stack(losses).mean()
        return weight * loss, loss

    def loss_arguments(self, batch: MicroBatch) -> tuple[tuple[Tensor, ...], dict]:
        """Return the empty prompt's context, and the noises and sigmas to score the clips at."""
        with torch.no_grad(), mixed_precision(self.device, self.options.precision):
            unconditional = self.encode([""] * len(batch.prompts))
        return (unconditional, *self._scoring_noise(batch)), {}

    def loss(
        self,
        clean: Tensor,
        context: Tensor,
        residuals: Residuals,
        unconditional: Tensor,
        noise: Tensor,
        sigma: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return dmd_loss; log the gradient's mean absolute value."""
        gradient = self._gradient(clean, context, unconditional, noise, sigma)
        return dmd_loss(clean, gradient), {"gradient": gradient.abs().mean()}

    @torch.no_grad()
    def improvement(self, before: Tensor, after: Tensor, batch: MicroBatch) -> float:
        """Return how much closer clips get to the real network's predictions of them.

        It is mean |clip - prediction| of `before` minus that of `after`. The fake network is not
        used: it follows the refined clips.
        """
        (unconditional, noise, sigma), _ = self.loss_arguments(batch)
        distances = []
        with mixed_precision(self.device, self.options.precision):
            texts = self.teacher.text(batch.context), self.teacher.text(unconditional)
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
        self, clean: Tensor, context: Tensor, unconditional: Tensor, noise: Tensor, sigma: Tensor
    ) -> Tensor:
        """Average dmd_gradient over draws of noise [N, B, C, F, h, w] and sigma [N, B]."""
        clean, guidance = clean.detach(), self.options.dmd.guidance
        with mixed_precision(self.device, self.options.precision):
            for_real = self.teacher.text(context), self.teacher.text(unconditional)
            texts = (*for_real, self.fake.text(context))
            gradients = [
                dmd_gradient(clean, *draw, self.teacher, self.fake, texts, guidance)
                for draw in zip(noise, sigma, strict=True)
            ]
        return torch.stack(gradients).mean(dim=0)

    def _scoring_noise(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return noises [N, B, C, F, h, w] and sigmas [N, B] to score the clips at.

        Those of the micro-batch if it holds any, else its rows of a draw for the whole step.
        """
        if batch.scored_at is not None:
            return batch.scored_at
        generator = noise_stream(self.device, self.options.seed, batch.index, batch.use, 1)
        shape = (batch.total, *batch.path.shape[2:])
        noises, sigmas = [], []
        for _ in range(self.options.score_draws):
            noises.append(torch.randn(shape, generator=generator, device=self.device)[batch.rows])
            sigmas.append(draw_sigma(batch.total, self.options.dmd, generator)[batch.rows])
        return torch.stack(noises), torch.stack(sigmas)
