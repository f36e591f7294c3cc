"""Load Reward and Score Video: rewards to train by, to search by, and to judge a video by."""

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
from .identity import Referable

RewardType = io.Custom("REWARD")
FOLDER = "rewards"  # of models/
BUNDLED = "bundled"


@dataclass(frozen=True, slots=True)
class Rewards(Referable):
    """Loaded rewards with their weights; `descriptions` identify them in a training's state."""

    parts: tuple[tuple[Reward, float], ...]
    descriptions: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the rewards' models."""
        models = [reward.model for reward, _ in self.parts]
        return sum(parameter.nbytes for model in models for parameter in model.parameters())

    @contextmanager
    def on(self, device: torch.device) -> Iterator[Mixture]:
        """Their weighted sum, with the models on a device meanwhile; ValueError for a duplicate."""
        mixture = Mixture(self.parts)
        try:
            self._move(device)
            yield mixture
        finally:
            self._move(torch.device("cpu"))

    @torch.inference_mode(False)  # tensors moved in that mode take no gradients any more
    def _move(self, device: torch.device) -> None:
        for reward, _ in self.parts:
            reward.model.to(device)


def model_folders() -> list[str]:
    """Choices of Load Reward."""
    return [BUNDLED, *host.list_folders(FOLDER)]


class LoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerLoadReward",
            display_name="Load Reward",
            category=CATEGORY,
            description="Loads a model that scores how well a video fits its prompt: for Train"
            " Refiner LoRA, Score Video and a sampler's search. Chain several to add them up.",
            search_aliases=["clip score", "pickscore", "hps", "reward model"],
            inputs=[
                io.Combo.Input(
                    "kind", options=list(KINDS), default=KINDS[0],
                    tooltip="sprites: the demo's reward, for its videos alone. clip, pick, hps:"
                    " scores by CLIP models (CLIPScore, PickScore, HPSv2.1), which need a model.",
                ),
                io.Combo.Input(
                    "model", options=model_folders(), default=BUNDLED,
                    tooltip="A CLIP model's folder in models/rewards, saved by transformers as"
                    " safetensors. bundled: for kind sprites.",
                ),
                io.Float.Input(
                    "weight", default=1.0, min=-100.0, max=100.0, step=0.05,
                    tooltip="The reward's weight in the sum.",
                ),
                io.Int.Input(
                    "frames", default=0, min=0, max=64, advanced=True,
                    tooltip="Frames of a video that the reward sees in a training step. 0: a good"
                    " number for the kind.",
                ),
                io.Int.Input(
                    "interval", default=0, min=0, max=64, advanced=True,
                    tooltip="Pixel frames from one of these frames to the next, where they form one"
                    " clip. 0: single frames.",
                ),
                RewardType.Input(
                    "more", optional=True,
                    tooltip="Another REWARD to add to this one.",
                ),
            ],
            outputs=[
                RewardType.Output(tooltip="For Train Refiner LoRA, Score Video and the samplers."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, kind: str, model: str, weight: float, frames: int, interval: int, more=None
    ) -> io.NodeOutput:
        if (model == BUNDLED) != (kind not in FORMULAS):
            raise ValueError(
                f"kind {kind} with model {model}: sprites is bundled, the others need a CLIP's"
                " folder"
            )
        path = "" if model == BUNDLED else str(host.find_folder(FOLDER, model))
        config = RewardConfig(kind, path, weight, frames, interval)
        with torch.inference_mode(False):  # a training may backpropagate through it
            reward = config.load()
        earlier = more or Rewards((), ())
        rewards = Rewards((*earlier.parts, (reward, weight)), (*earlier.descriptions, repr(config)))
        Mixture(rewards.parts)  # refuses two of one name
        return io.NodeOutput(rewards)


class ScoreVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerScoreVideo",
            display_name="Score Video",
            category=CATEGORY,
            description="Scores a video with a reward, given its prompt. Higher is better; only"
            " compare scores of the same reward and prompt.",
            search_aliases=["clip score", "evaluate", "reward"],
            inputs=[
                io.MultiType.Input("video", types=EITHER, tooltip="Images or a video."),
                RewardType.Input("reward", tooltip="From Load Reward."),
                io.String.Input(
                    "prompt", multiline=True, default="", tooltip="The prompt of the video."
                ),
            ],
            outputs=[
                io.Float.Output(display_name="score", tooltip="The weighted sum of the rewards.")
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, video, reward: Rewards, prompt: str) -> io.NodeOutput:
        nbytes = 3 * PIXEL_BYTES * math.prod(host.clip_size(video))
        check_room(nbytes, "scoring this video", "use a shorter one")
        frames, _ = host.clip_frames(video, 16)
        device = host.torch_device(reward.nbytes)
        with reward.on(device) as mixture, torch.no_grad():
            drawn = mixture.newest(len(frames), len(frames))
            numbers = sorted(set().union(*drawn))
            pixels_FCHW = torch.from_numpy(frames[numbers]).to(device).permute(0, 3, 1, 2)
            total, scores = mixture(pixels_FCHW[None].float() / 255, numbers, drawn, [prompt])
        text = f"score {total.item():.4f}"
        if len(scores) > 1:
            listed = ", ".join(f"{name} {score.item():.4f}" for name, score in scores.items())
            text += f" ({listed})"
        return io.NodeOutput(total.item(), ui=host.show(text))
