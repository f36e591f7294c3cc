"""The interface of rewards: differentiable scores of a video's frames under its prompt.

Higher is better. F counts frames drawn from a video; `numbers` are their pixel frame indices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SLACK = 1e-3  # share of a range that rounding may exceed it by


@dataclass(frozen=True, slots=True)
class FrameDraw:
    """Which frames of a video a reward sees: `count` single ones, or a clip with an `interval`.

    A clip begins at the video's first frame in a share `opening` of the draws, else anywhere. A
    video that is too short yields fewer frames.
    """

    count: int
    interval: int = 0  # pixel frames from one frame of the clip to the next
    opening: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1 or self.interval < 0 or not 0 <= self.opening <= 1:
            raise ValueError(
                f"{self.count} frames at an interval of {self.interval}:"
                " give at least 1 frame, and an interval of 0 (single frames) or more"
            )

    @property
    def reach(self) -> int:
        """How many frames a search's windows reach back from a video's last one."""
        return max(0, self.interval * self.count - 1)

    def draw(self, rng: np.random.Generator, total: int) -> tuple[int, ...]:
        """Draw frames for a training step, rising, from a video of `total`."""
        if not self.interval:
            return tuple(sorted(rng.choice(total, min(self.count, total), replace=False).tolist()))
        span = self._span(total)
        first = 0 if rng.random() < self.opening else int(rng.integers(total - span))
        return tuple(range(first, first + span + 1, self.interval))

    def windows(self, total: int, new: int) -> tuple[tuple[int, ...], ...]:
        """Return windows to judge the last `new` frames of a video of `total` by; deterministic.

        Clips end at each of the last `interval` frames, so together they see every new frame that
        they reach. Single frames make one window.
        """
        if self.interval:
            ends = range(total, max(0, total - self.interval), -1)
            return tuple(
                tuple(range(end - 1 - self._span(end), end, self.interval)) for end in ends
            )
        places = np.linspace(total - new, total - 1, min(self.count, new) + 2)[1:-1]
        return (tuple(dict.fromkeys(places.round().astype(int).tolist())),)

    def newest(self, total: int, new: int) -> tuple[int, ...]:
        """Return the last window."""
        return self.windows(total, new)[0]

    def _span(self, total: int) -> int:
        return self.interval * min(self.count - 1, (total - 1) // self.interval)


class Reward(Protocol):
    """A differentiable score, higher is better."""

    name: str
    range: tuple[float, float]  # bounds of the scores
    frames: FrameDraw

    def __call__(
        self, frames_BFCHW: Tensor, numbers: Sequence[int], prompts: Sequence[str]
    ) -> Tensor:
        """Return differentiable fp32 scores [B] of frames [B, F, 3, H, W] in 0–1."""
        ...


def scored(
    reward: Reward, frames_BFCHW: Tensor, numbers: Sequence[int], prompts: Sequence[str]
) -> Tensor:
    """Return a reward's scores [B]; ValueError if one is NaN or outside the reward's range."""
    scores = reward(frames_BFCHW, numbers, prompts)
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"reward {reward.name} gave scores {tuple(scores.shape)}, expected [{len(prompts)}]:"
            " return one per video"
        )
    low, high = reward.range
    slack = SLACK * (high - low)
    inside = (scores >= low - slack) & (scores <= high + slack)  # False for NaN
    if not inside.all():
        worst = scores[~inside][0].item()
        raise ValueError(
            f"reward {reward.name} gave {worst:.4g}, outside of its range {low:g} to {high:g}:"
            " check its weights and its range"
        )
    return scores


@dataclass(frozen=True, slots=True)
class Mixture:
    """A weighted sum of rewards; ValueError for none, or two of one name."""

    parts: tuple[tuple[Reward, float], ...]

    def __post_init__(self) -> None:
        names = [reward.name for reward, _ in self.parts]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"rewards {', '.join(names) or 'none'}: name at least one, and each once"
            )

    @property
    def reach(self) -> int:
        """How many frames the rewards reach back from a video's last one in a search."""
        return max(reward.frames.reach for reward, _ in self.parts)

    def draw(self, rng: np.random.Generator, total: int) -> list[tuple[int, ...]]:
        """Draw frames of a video of `total` for each reward."""
        return [reward.frames.draw(rng, total) for reward, _ in self.parts]

    def newest(self, total: int, new: int) -> list[tuple[int, ...]]:
        """Return the last window of each reward; see FrameDraw.windows."""
        return [reward.frames.newest(total, new) for reward, _ in self.parts]

    def judge(self, frames_BFCHW: Tensor, total: int, new: int, prompts: Sequence[str]) -> Tensor:
        """Return the sum [B] for the last `new` frames of a video of `total`, as a search needs it.

        Each reward counts by its mean over its windows (see FrameDraw.windows). The frames
        [B, F, 3, H, W] are the video's last ones.
        """
        first = total - frames_BFCHW.shape[1]
        result = 0.0
        for reward, weight in self.parts:
            windows = reward.frames.windows(total, new)
            scores = [
                scored(reward, frames_BFCHW[:, [number - first for number in seen]], seen, prompts)
                for seen in windows
            ]
            result = result + weight * torch.stack(scores).mean(dim=0)
        return result

    def __call__(
        self,
        frames_BFCHW: Tensor,
        numbers: Sequence[int],
        drawn: Sequence[tuple[int, ...]],
        prompts: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum [B], and each reward's scores [B] by name.

        `numbers` are those of frames [B, F, 3, H, W], `drawn` those that each reward sees.
        """
        place = {number: index for index, number in enumerate(numbers)}
        scores = {
            reward.name: scored(
                reward, frames_BFCHW[:, [place[number] for number in seen]], seen, prompts
            )
            for (reward, _), seen in zip(self.parts, drawn, strict=True)
        }
        return sum(weight * scores[reward.name] for reward, weight in self.parts), scores
