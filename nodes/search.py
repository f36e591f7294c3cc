"""Search by Reward: a reward chooses among decoded candidates of a sampler node."""

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
from .api import CATEGORY, host, io
from .rewards import Rewards, RewardType

SearchType = io.Custom("SEARCH")
METHODS = tuple(METHODS_BY_NAME)
SELF_FORCING = METHODS[0]  # the sampler nodes' default, and how every search samples
CANDIDATES, MOST_CANDIDATES = 5, 64  # default, maximum
FORMER = {"hidden": True}  # inputs of older workflows: the page shows them only where they count


@dataclass(frozen=True, slots=True)
class RewardSearch:
    """A search method with the rewards, VAE and prompt that it chooses by."""

    method: str  # of SEARCHES
    rewards: Rewards
    vae: Any  # VAE
    prompt: str
    candidates: int

    def checked_prompt(self) -> str:
        """Return the prompt; ValueError if it is blank."""
        if not self.prompt.strip():
            raise ValueError(
                f"method {self.method} has no prompt for its reward: write what the video is to"
                " show into Search by Reward, or connect a Prompt Timeline to the sampler"
            )
        return self.prompt

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

        `prompts` replace the search's own. Raises ValueError where there are none at all.
        """
        timeline = prompts or Timeline.of(self.checked_prompt())
        scenes = (replace(scene, prompt=[scene.prompt] * batch) for scene in timeline.scenes)
        with self.rewards.on(device) as rewards:
            yield RewardVerifier(rewards, host.own_vae(self.vae), Timeline(tuple(scenes)))


class SearchByReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerSearch",
            display_name="Search by Reward",
            category=CATEGORY,
            description="Makes a sampler try several noises for each chunk and keep what a reward"
            " likes best. Learns nothing; pays with time.",
            search_aliases=["best of n", "bon", "search over path", "inference-time scaling"],
            inputs=[
                io.Combo.Input(
                    "method", options=list(SEARCHES), default="best-of-n",
                    tooltip="best-of-n makes each chunk several times, search-over-path each level"
                    " of a chunk; the best candidate is kept.",
                ),
                RewardType.Input("reward", tooltip="From Load Reward: it chooses the candidate."),
                io.Vae.Input(
                    "vae", tooltip="Wan2.1's VAE, or the demo's: the reward sees decoded frames."
                ),
                io.String.Input(
                    "prompt", multiline=True, default="", optional=True,
                    tooltip="The prompt as text, which only the reward reads: the words that"
                    " positive has. Not needed with a Prompt Timeline, whose texts it reads.",
                ),
                io.Int.Input(
                    "candidates", default=CANDIDATES, min=2, max=MOST_CANDIDATES, optional=True,
                    tooltip="The time grows with it: 5 take more than five times as long.",
                ),
            ],
            outputs=[SearchType.Output(tooltip="For the samplers.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, method: str, reward: Rewards, vae, prompt: str = "", candidates: int = CANDIDATES
    ) -> io.NodeOutput:
        host.vae_width(vae)  # refuses a VAE that cannot decode candidates
        return io.NodeOutput(RewardSearch(method, reward, vae, prompt, candidates))


def search_inputs() -> list:
    """Return the inputs of a sampler node for a search; those of older workflows are hidden."""
    return [
        SearchType.Input(
            "search", optional=True,
            tooltip="From Search by Reward: tries several noises and keeps the best chunks.",
        ),
        RewardType.Input(
            "reward", optional=True, extra_dict=FORMER,
            tooltip="Of older workflows, now in Search by Reward: what a search chooses by.",
        ),
        io.Vae.Input(
            "vae", optional=True,
            tooltip="Wan2.1's VAE: to watch the video while it is sampled, and to encode start"
            " images.",
        ),
        io.String.Input(
            "prompt", default="", optional=True, extra_dict=FORMER,
            tooltip="Of older workflows, now in Search by Reward: the text that the reward reads.",
        ),
        io.Int.Input(
            "candidates", default=CANDIDATES, min=2, max=MOST_CANDIDATES, optional=True,
            advanced=True, extra_dict=FORMER,
            tooltip="Of older workflows, now in Search by Reward: how many candidates there are.",
        ),
    ]  # fmt: skip


def search_of(
    method: str,
    search: RewardSearch | None = None,
    reward: Rewards | None = None,
    vae: Any = None,
    prompt: str = "",
    candidates: int = CANDIDATES,
) -> RewardSearch | None:
    """Return the search of a sampler node: the connected one, or that of an older workflow.

    Raises ValueError for a method that contradicts it, or that searches without a reward.
    """
    if search is None and method in SEARCHES:
        return former_search(method, reward, vae, prompt, candidates)
    if prompt.strip():
        host.notice(
            "the sampler's input prompt does nothing: the text of the video goes into positive, and"
            " what a reward reads into Search by Reward"
        )
    if search is not None and method not in (SELF_FORCING, search.method):
        raise ValueError(
            f"method {method} and a search by {search.method} are connected, which samples as"
            f" {SELF_FORCING}: set method to {SELF_FORCING}, or disconnect search"
        )
    return search


def former_search(
    method: str, reward: Rewards | None, vae: Any, prompt: str, candidates: int
) -> RewardSearch:
    """Return the search of an older workflow; ValueError if its reward or VAE is missing."""
    given = {"reward": reward, "vae": vae}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"method {method} chooses by a reward and needs {' and '.join(missing)}: connect a"
            " Search by Reward, which has them"
        )
    return RewardSearch(method, reward, vae, prompt, candidates)
