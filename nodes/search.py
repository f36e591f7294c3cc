"""Search methods of the sampler nodes: a reward chooses among decoded candidates."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..refiner.sample import RunPlan
from ..refiner.samplers import METHODS as METHODS_BY_NAME
from ..refiner.samplers import SEARCHES, Method
from ..refiner.samplers.search import Verifier
from ..refiner.timeline import Timeline
from ..refiner.training.rewards.reward import Mixture
from ..refiner.training.rewards.verifier import RewardVerifier
from ..refiner.wan.vae import WanVAE
from .api import host, io
from .rewards import Rewards, RewardType

METHODS = tuple(METHODS_BY_NAME)
CANDIDATES, MOST_CANDIDATES = 5, 64  # default, maximum


@dataclass(frozen=True, slots=True)
class RewardSearch:
    """A search method with the rewards, VAE and prompt that it chooses by."""

    method: str  # of SEARCHES
    rewards: Rewards
    vae: Any  # VAE
    prompt: str
    candidates: int

    def sampler(self, verifier: Verifier | None = None) -> Method:
        """Return the method; without a verifier it can be checked and counted, but not run."""
        return SEARCHES[self.method](verifier, self.candidates)

    def describe(self) -> str:
        """Describe the search in a few words."""
        names = ", ".join(reward.name for reward, _ in self.rewards.parts)
        return f"{self.method} of {self.candidates} candidates by {names}"

    def nbytes(self, plan: RunPlan) -> int:
        """Count the bytes of the rewards' models, of a VAE, and of judging every sample."""
        dim, chunk = host.vae_width(self.vae), plan.preset.chunk
        size, reach = (8 * plan.height, 8 * plan.width), Mixture(self.rewards.parts).reach
        sample = RewardVerifier.sample_bytes(dim, *size, chunk, reach, torch.float32)
        with torch.device("meta"):
            weights = sum(parameter.nbytes for parameter in WanVAE(dim).parameters())
        return self.rewards.nbytes + weights + plan.batch * sample

    @contextmanager
    def verifier(
        self, batch: int, device: torch.device, prompts: Timeline[str] | None = None
    ) -> Iterator[Verifier]:
        """Enter with the verifier, whose models stay on the device until exit.

        `prompts` replace the search's own.
        """
        timeline = prompts or Timeline.of(self.prompt)
        scenes = (replace(scene, prompt=[scene.prompt] * batch) for scene in timeline.scenes)
        with self.rewards.on(device) as rewards:
            yield RewardVerifier(rewards, host.own_vae(self.vae), Timeline(tuple(scenes)))


def search_inputs() -> list:
    """Return the inputs of a sampler node that only a search needs."""
    return [
        RewardType.Input(
            "reward", optional=True,
            tooltip="For best-of-n and search-over-path: what they choose by.",
        ),
        io.Vae.Input(
            "vae", optional=True,
            tooltip="For best-of-n and search-over-path: Wan2.1's VAE, the reward sees frames.",
        ),
        io.String.Input(
            "prompt", default="", optional=True,
            tooltip="For best-of-n and search-over-path: the prompt as text, which only the reward"
            " reads. With a Prompt Timeline it reads the timeline's.",
        ),
        io.Int.Input(
            "candidates", default=CANDIDATES, min=2, max=MOST_CANDIDATES, optional=True,
            advanced=True,
            tooltip="best-of-n makes each chunk so often, search-over-path each level of it, and"
            " keeps the best. The time grows with it: 5 take more than five times as long.",
        ),
    ]  # fmt: skip


def search_of(
    method: str, reward: Rewards | None, vae: Any, prompt: str, candidates: int
) -> RewardSearch | None:
    """Return the search of a sampler node; None for a method that does not search.

    Raises ValueError when an input of a search is missing.
    """
    if method not in SEARCHES:
        return None
    given = {"reward": reward, "vae": vae, "prompt": prompt.strip() or None}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        advice = f"connect {missing[0]}"
        if missing[0] == "prompt":
            advice = "write what the video is to show into prompt"
        raise ValueError(
            f"method {method} chooses by a reward and needs {' and '.join(missing)}: {advice}"
        )
    return RewardSearch(method, reward, vae, prompt, candidates)
