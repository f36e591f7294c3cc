"""Load Reward and Score Video: what a refiner is trained to raise, and what it says of a finished video."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..refiner.estimate import check_room
from ..refiner.train_config import KINDS, RewardConfig
from ..refiner.training.rewards.clip import FORMULAS
from ..refiner.training.rewards.reward import Mixture, Reward
from .api import CATEGORY, host, io
from .compare import EITHER, PIXEL_BYTES

RewardType = io.Custom("REWARD")
FOLDER = "rewards"  # of models/
BUNDLED = "bundled"


@dataclass(frozen=True, slots=True)
class Rewards:
    """Loaded rewards with their weights, and what tells them from others."""

    parts: tuple[tuple[Reward, float], ...]
    told: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of their models."""
        parameters = (parameter for reward, _ in self.parts for parameter in reward.model.parameters())
        return sum(parameter.nbytes for parameter in parameters)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[Mixture]:
        """Their weighted sum, with the models on a device until it is left; ValueError where one is there twice."""
        mixture = Mixture(self.parts)
        try:
            self._move(device)
            yield mixture
        finally:
            self._move(torch.device("cpu"))

    @torch.inference_mode(False)  # moved in that mode, a training could not go through them any more
    def _move(self, device: torch.device) -> None:
        for reward, _ in self.parts:
            reward.model.to(device)


def model_folders() -> list[str]:
    """What Load Reward can choose from."""
    return [BUNDLED, *host.list_folders(FOLDER)]


class LoadReward(io.ComfyNode):
    """A REWARD, of one model or several."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerLoadReward",
            display_name="Load Reward",
            category=CATEGORY,
            description="Loads a model that scores how well a video fits its prompt: for Train Refiner LoRA, Score"
            " Video and a sampler's search. Connect several one behind the other to add them up.",
            search_aliases=["clip score", "pickscore", "hps", "reward model"],
            inputs=[
                io.Combo.Input(
                    "kind", options=list(KINDS), default=KINDS[0],
                    tooltip="sprites: the demo's own, for its videos alone. clip, pick, hps: formulas of CLIP models"
                    " (CLIPScore, PickScore, HPSv2.1), which need a model.",
                ),
                io.Combo.Input(
                    "model", options=model_folders(), default=BUNDLED,
                    tooltip="A CLIP's folder in models/rewards, as transformers saves it in safetensors. bundled:"
                    " of kind sprites.",
                ),
                io.Float.Input(
                    "weight", default=1.0, min=-100.0, max=100.0, step=0.05, tooltip="Its part in the sum.",
                ),
                io.Int.Input(
                    "frames", default=0, min=0, max=64, advanced=True,
                    tooltip="Frames of a video that it sees in a training step. 0: as is good for the kind.",
                ),
                io.Int.Input(
                    "interval", default=0, min=0, max=64, advanced=True,
                    tooltip="Pixel frames between two of them, for a clip of neighbours. 0: single frames.",
                ),
                RewardType.Input("more", optional=True, tooltip="Another REWARD to add to this one."),
            ],
            outputs=[RewardType.Output(tooltip="For Train Refiner LoRA, Score Video and the samplers.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, kind: str, model: str, weight: float, frames: int, interval: int, more=None) -> io.NodeOutput:
        if (model == BUNDLED) != (kind not in FORMULAS):
            raise ValueError(f"kind {kind} with model {model}: sprites is bundled, the others need a CLIP's folder")
        path = "" if model == BUNDLED else str(host.find_folder(FOLDER, model))
        config = RewardConfig(kind, path, weight, frames, interval)
        with torch.inference_mode(False):  # a training goes through it
            reward = config.load()
        before = more or Rewards((), ())
        found = Rewards((*before.parts, (reward, weight)), (*before.told, repr(config)))
        Mixture(found.parts)  # refuses two of one name
        return io.NodeOutput(found)


class ScoreVideo(io.ComfyNode):
    """A number for a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerScoreVideo",
            display_name="Score Video",
            category=CATEGORY,
            description="What a reward says of a video under a prompt. Higher is better; only compare scores of one"
            " reward and one prompt.",
            search_aliases=["clip score", "evaluate", "reward"],
            inputs=[
                io.MultiType.Input("video", types=EITHER, tooltip="Images, or a video."),
                RewardType.Input("reward", tooltip="From Load Reward."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What the video is to show."),
            ],
            outputs=[io.Float.Output(display_name="score", tooltip="The weighted sum of the rewards.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, video, reward: Rewards, prompt: str) -> io.NodeOutput:
        check_room(3 * PIXEL_BYTES * math.prod(host.clip_size(video)), "scoring this video", "use a shorter one")
        frames, _ = host.clip_frames(video, 16)
        device = host.torch_device(reward.nbytes)
        with reward.on(device) as mixture, torch.no_grad():
            drawn = mixture.newest(len(frames), len(frames))
            numbers = sorted(set().union(*drawn))
            seen = torch.from_numpy(frames[numbers]).to(device).permute(0, 3, 1, 2)[None].float() / 255
            total, scores = mixture(seen, numbers, drawn, [prompt])
        parts = ", ".join(f"{name} {score.item():.4f}" for name, score in scores.items())
        told = f"score {total.item():.4f}" + (f" ({parts})" if len(scores) > 1 else "")
        return io.NodeOutput(total.item(), ui=host.show(told))
