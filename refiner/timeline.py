"""What a video is told, and when: prompts by the latent frame from which they hold."""

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
    """Write the last `frames` into memory anew under the new prompt; forget the rest but the sink
    (LongLive)."""

    frames: int


@dataclass(frozen=True, slots=True)
class Flush:
    """Forget all of the past but the sink and its last frames (KV flush of Infinity-RoPE)."""

    keep_last: int = 1


Transition = Keep | Recache | Flush | Cut


@dataclass(frozen=True, slots=True)
class PromptSwitch:
    """From the next pass on, another context [B, L, text_dim]; the last `recache` frames are
    written anew."""

    context: Tensor
    recache: int = 0


Event = PromptSwitch | Flush | Cut


@dataclass(frozen=True, slots=True)
class Scene(Generic[Prompt]):
    """A prompt that holds from the first chunk that begins at or behind a latent frame."""

    start: int
    prompt: Prompt
    transition: Transition = Keep()


@dataclass(frozen=True, slots=True)
class Timeline(Generic[Prompt]):
    """Scenes in order, the first one from frame 0. One scene is a run with one prompt."""

    scenes: tuple[Scene[Prompt], ...]

    def __post_init__(self) -> None:
        starts = [scene.start for scene in self.scenes]
        if not starts or starts[0] != 0 or any(late <= early for early, late in pairwise(starts)):
            raise ValueError(
                f"scenes start at frames {starts}: the first starts at 0, each later one behind it"
            )

    @classmethod
    def of(cls, prompt: Prompt) -> "Timeline[Prompt]":
        """The timeline of one prompt."""
        return cls((Scene(0, prompt),))

    @property
    def recached(self) -> int:
        """Most latent frames that a transition writes anew."""
        frames = (
            scene.transition.frames
            for scene in self.scenes
            if isinstance(scene.transition, Recache)
        )
        return max(frames, default=0)

    def map(self, encode: Callable[[Prompt], Tensor]) -> "Timeline[Tensor]":
        """The same timeline of encoded prompts."""
        return Timeline(tuple(replace(scene, prompt=encode(scene.prompt)) for scene in self.scenes))

    def events(self, chunk: Chunk, before: Chunk | None) -> Sequence[Event]:
        """What happens before a chunk; nothing at the first one, whose prompt is that of the run's
        start.

        Of several scenes that begin within a chunk the last one counts.
        """
        if before is None:
            return ()
        due = [scene for scene in self.scenes if before.start < scene.start <= chunk.start]
        if not due:
            return ()
        scene = due[-1]
        recache = scene.transition.frames if isinstance(scene.transition, Recache) else 0
        changes = (scene.transition,) if isinstance(scene.transition, (Flush, Cut)) else ()
        return (*changes, PromptSwitch(scene.prompt, recache))
