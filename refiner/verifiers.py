"""Searches of `autorefiner generate`: methods that choose by a reward, planned before loading."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .bundles import find_training_bundle
from .choices import choose
from .request import GenerateOptions
from .run_plan import RunPlan
from .samplers import SAMPLERS, SEARCHES, Method
from .samplers.search import Verifier
from .train_config import KINDS, RewardConfig
from .training.rewards.clip import SINGLE
from .training.rewards.reward import Mixture
from .training.rewards.verifier import RewardVerifier
from .wan.vae import WanVAE
from .wan.weight_file import open_weights

# By the name that users give. Arguments are knobs.
REWARDS: dict[str, Callable[..., RewardConfig]] = {
    kind: partial(RewardConfig, kind) for kind in KINDS
}


def choose_method(text: str, verifier: Verifier | None = None) -> Method:
    """Return the method that `text` names; without a verifier a search can be planned, not run."""
    searches = {name: partial(search, verifier) for name, search in SEARCHES.items()}
    return choose(text, SAMPLERS | searches, "method")


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """The criterion of a search: the sum of rewards of the decoded frames under a prompt."""

    method: str  # one of SEARCHES, with knobs
    rewards: tuple[RewardConfig, ...]
    prompt: str

    @classmethod
    def of(cls, options: GenerateOptions) -> "SearchPlan | None":
        """Plan the search that a request names; None for a method that does not search.

        Raises ValueError for a search without a reward or prompt, a reward without a search, and
        rewards that cannot be loaded or do not fit.
        """
        name = options.sampler.partition(":")[0]
        if name not in SEARCHES:
            if options.reward:
                raise ValueError(
                    f"--reward with method {name}, which makes one candidate: use --method"
                    f" {' or '.join(SEARCHES)}, or leave it out"
                )
            return None
        if not options.reward:
            raise ValueError(
                f"method {name} chooses by a reward: give --reward, one of {', '.join(REWARDS)}"
            )
        if not options.prompt.strip():
            raise ValueError(f"method {name}: its reward reads the prompt as text, give --prompt")
        rewards = tuple(choose(text, REWARDS, "reward") for text in options.reward)
        for kind in (names := [reward.kind for reward in rewards]):
            if names.count(kind) > 1:
                raise ValueError(f"reward {kind} is given twice: give it once, with a weight")
            check_size(kind, options.width, options.height)
        return cls(options.sampler, rewards, options.prompt)

    def describe(self) -> str:
        """Describe the rewards in a few words."""
        return ", ".join(map(describe_reward, self.rewards))

    def nbytes(self, plan: RunPlan, vae_width: int, dtype: torch.dtype) -> int:
        """Count the bytes of the rewards' models and of judging; reads headers of files only."""
        sizes = [reward_size(reward) for reward in self.rewards]
        reach = max(reach for _, reach in sizes)
        size = 8 * plan.height, 8 * plan.width
        judging = RewardVerifier.sample_bytes(vae_width, *size, plan.preset.chunk, reach, dtype)
        return sum(nbytes for nbytes, _ in sizes) + plan.batch * judging

    def loaded(self, vae: WanVAE, device: torch.device) -> Method:
        """Load the rewards and return the method; `vae` decodes what they see."""
        rewards = tuple((reward.load(device), reward.weight) for reward in self.rewards)
        return choose_method(self.method, RewardVerifier(Mixture(rewards), vae, [self.prompt]))


def check_size(kind: str, width: int, height: int) -> None:
    """Raise ValueError for frames of another size than a bundle's reward sees."""
    bundle = find_training_bundle(kind)
    if bundle and bundle.size != (width, height):
        raise ValueError(
            f"reward {kind} sees frames of {'{}x{}'.format(*bundle.size)}, this run makes"
            f" {width}x{height}: use another reward or --size"
        )


def describe_reward(reward: RewardConfig) -> str:
    """Name a reward, its folder and its weight."""
    weight = "" if reward.weight == 1 else f" x {reward.weight:g}"
    return " ".join(filter(None, (reward.kind, Path(reward.path).name))) + weight


def reward_size(reward: RewardConfig) -> tuple[int, int]:
    """Return the bytes of a reward's model in fp32, and how many frames it looks back.

    Raises ValueError for a folder without a model in safetensors.
    """
    if bundle := find_training_bundle(reward.kind):
        model = bundle.training.reward(reward.draw, "meta")
        return sum(each.nbytes for each in model.model.parameters()), model.frames.reach
    files = sorted(Path(reward.path).glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{reward.path} holds no model in safetensors: name a CLIP's folder, as transformers"
            " saves it"
        )
    groups = open_weights(files[0]).groups.values()  # with its siblings if it is a shard
    nbytes = sum(4 * tensor.numel() for group in groups for tensor in group.values())
    return nbytes, reward.draw(SINGLE).reach
