"""Timelines of prompts: each prompt holds from a latent frame on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

from torch import Tensor

from .memory.positions import Cut
from .schedule import Chunk

Prompt = TypeVar("Prompt")  # a text, or its context [B, L, text_dim]


@dataclass(frozen=True, slots=True)
class Keep:
    """Leave the memory as it was written."""


@dataclass(frozen=True, slots=True)
class Recache:
    """Rewrite the last `frames` in memory under the new prompt; keep the sink only (LongLive)."""

    frames: int


@dataclass(frozen=True, slots=True)
class Flush:
    """Drop all past frames but the sink and the last ones (KV flush of Infinity-RoPE)."""

    keep_last: int = 1


Transition = Keep | Recache | Flush | Cut


@dataclass(frozen=True, slots=True)
class PromptSwitch:
    """Use another context [B, L, text_dim] from now on; rewrite the last `recache` frames."""

    context: Tensor
    recache: int = 0


Event = PromptSwitch | Flush | Cut


@dataclass(frozen=True, slots=True)
class Scene(Generic[Prompt]):
    """A prompt that holds from the first chunk that starts at latent frame `start` or later."""

    start: int
    prompt: Prompt
    transition: Transition = Keep()


def recached_frames(scene: Scene) -> int:
    """Return the latent frames that a scene's transition rewrites."""
    return scene.transition.frames if isinstance(scene.transition, Recache) else 0


@dataclass(frozen=True, slots=True)
class Timeline(Generic[Prompt]):
    """Scenes in order, the first at frame 0. A run with one prompt has one scene."""

    scenes: tuple[Scene[Prompt], ...]

    def __post_init__(self) -> None:
        starts = [scene.start for scene in self.scenes]
        rises = all(early < late for early, late in pairwise(starts))
        if not starts or starts[0] != 0 or not rises:
            raise ValueError(
                f"scenes start at frames {starts}: the first starts at 0, each later one behind it"
            )

    @classmethod
    def of(cls, prompt: Prompt) -> "Timeline[Prompt]":
        """Make the timeline of one prompt."""
        return cls((Scene(0, prompt),))

    @property
    def recached(self) -> int:
        """The largest number of latent frames that a transition rewrites."""
        return max(map(recached_frames, self.scenes))

    def map(self, encode: Callable[[Prompt], Tensor]) -> "Timeline[Tensor]":
        """Encode every prompt."""
        return Timeline(tuple(replace(scene, prompt=encode(scene.prompt)) for scene in self.scenes))

    def events(self, chunk: Chunk, before: Chunk | None) -> Sequence[Event]:
        """Return the events before a chunk; none before the first chunk of a run.

        Of several scenes that start within a chunk, the last one counts.
        """
        if before is None:
            return ()
        due = [scene for scene in self.scenes if before.start < scene.start <= chunk.start]
        if not due:
            return ()
        scene = due[-1]
        changes = (scene.transition,) if isinstance(scene.transition, (Flush, Cut)) else ()
        return (*changes, PromptSwitch(scene.prompt, recached_frames(scene)))
