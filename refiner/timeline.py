"""Timelines of prompts: each prompt holds from a latent frame on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .memory.positions import Cut
from .schedule import Chunk

Prompt = TypeVar("Prompt")  # a text, or its context [B, L, text_dim]


@dataclass(frozen=True, slots=True)
class Keep:
    """Leave the memory as it was written."""


@dataclass(frozen=True, slots=True)
class Recache:
    """Rewrite the last `frames` in memory under the new prompt; drop older ones but the sink.

    The sink stays as it was written (LongLive's global sink), or is rewritten with the rest.
    """

    frames: int
    protect_sink: bool = True


@dataclass(frozen=True, slots=True)
class Flush:
    """Drop all past frames but the sink and the last ones (KV flush of Infinity-RoPE)."""

    keep_last: int = 1


Transition = Keep | Recache | Flush | Cut


@dataclass(frozen=True, slots=True)
class PromptSwitch:
    """Use another context [B, L, text_dim] from now on; rewrite past frames under it.

    A context that is in force already changes nothing.
    """

    context: Tensor
    recache: int = 0  # the last frames in memory to rewrite
    protect_sink: bool = True  # from being rewritten


Event = PromptSwitch | Flush | Cut


@dataclass(frozen=True, slots=True)
class Scene(Generic[Prompt]):
    """A prompt that holds from the first chunk that starts at latent frame `start` or later.

    A `cut` places that chunk away from its history, besides the transition.
    """

    start: int
    prompt: Prompt
    transition: Transition = Keep()
    cut: Cut | None = None

    @property
    def events(self) -> "tuple[Event, ...]":
        """The events before its first chunk; a cut is last, as it is for the next pass alone."""
        match self.transition:
            case Recache(frames, protect_sink):
                events = [PromptSwitch(self.prompt, frames, protect_sink)]
            case Flush():
                events = [self.transition, PromptSwitch(self.prompt)]
            case _:
                events = [PromptSwitch(self.prompt)]
        cut = self.transition if isinstance(self.transition, Cut) else self.cut
        return (*events, cut) if cut else tuple(events)


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

    @property
    def cuts(self) -> bool:
        """Whether a scene begins with a cut, which needs relative positions."""
        return any(isinstance(event, Cut) for scene in self.scenes for event in scene.events)

    def at(self, frame: int) -> Scene[Prompt]:
        """Return the scene that holds at a chunk which starts at this latent frame."""
        return [scene for scene in self.scenes if scene.start <= frame][-1]

    def events(self, chunk: Chunk, before: Chunk | None) -> Sequence[Event]:
        """Return the events before a chunk; none before the first chunk of a run.

        Of several scenes that start within a chunk, the last one counts.
        """
        if before is None:
            return ()
        scene = self.at(chunk.start)
        return scene.events if before.start < scene.start else ()


def stack(timelines: Sequence[Timeline[Tensor]]) -> Timeline[Tensor]:
    """Join the timelines of a batch's samples, each of contexts [1, L, text_dim].

    The batch shares its memory, so scenes that start together need the same transition, and only
    `keep` can start a scene of some samples alone.
    """
    scenes = []
    for start in sorted({scene.start for timeline in timelines for scene in timeline.scenes}):
        present = [timeline.at(start) for timeline in timelines]
        starting = [scene for scene in present if scene.start == start]
        changes = {(scene.transition, scene.cut) for scene in starting}
        transition, cut = changes.pop()
        keeps = isinstance(transition, Keep) and cut is None
        if changes or (len(starting) < len(present) and not keeps):
            raise ValueError(
                f"frame {start}: the samples of a batch share one memory; give their scenes there"
                " the same transition, and where only some change their prompt, `keep`"
            )
        prompt = torch.cat([scene.prompt for scene in present])
        scenes.append(Scene(start, prompt, transition, cut))
    return Timeline(tuple(scenes))
