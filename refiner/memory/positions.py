"""Temporal RoPE positions of stored frames and of the current chunk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import pi
from typing import ClassVar, NamedTuple, Protocol

from ..wan.rope import axis_pairs, frequencies_of, span


class Placement(NamedTuple):
    """Temporal positions of the visible past, oldest first, and of the chunk."""

    past: tuple[int, ...]
    chunk: tuple[int, ...]


class Positions(Protocol):
    """A rule for positions; `moving` ones change from chunk to chunk and need keys before RoPE."""

    name: ClassVar[str]
    moving: ClassVar[bool]

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        """Place past frames, of which the first `sink` are sink, and a chunk, by absolute index."""
        ...

    def frequencies(self, head_dim: int) -> tuple[float, ...] | None:
        """Return the temporal frequencies of RoPE's pairs; None: as the model was trained."""
        return None


@dataclass(frozen=True, slots=True)
class Absolute(Positions):
    """The position of a frame is its index in the video (Self-Forcing)."""

    name: ClassVar[str] = "absolute"
    moving: ClassVar[bool] = False

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        return Placement(tuple(past), tuple(chunk))


@dataclass(frozen=True, slots=True)
class Relative(Positions):
    """The position of a frame is its rank in the window: distances stay in the training range.

    LongLive's infinite variant; the block-relativistic RoPE of Infinity-RoPE.
    """

    name: ClassVar[str] = "relative"
    moving: ClassVar[bool] = True

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        return Placement(span(0, len(past)), span(len(past), len(chunk)))


@dataclass(frozen=True, slots=True)
class SinkAdjacent(Positions):
    """Absolute, with the sink right before the oldest recent frame (Rolling Forcing)."""

    name: ClassVar[str] = "sink-adjacent"
    moving: ClassVar[bool] = True

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        recent = (*past[sink:], *chunk)
        moved = span(recent[0] - len(past[:sink]), len(past[:sink]))
        return Placement((*moved, *past[sink:]), tuple(chunk))


@dataclass(frozen=True, slots=True)
class Cut(Positions):
    """Relative, with the chunk at `position`, away from its history (RoPE cut of Infinity-RoPE)."""

    name: ClassVar[str] = "cut"
    moving: ClassVar[bool] = True

    position: int = 45

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        return Placement(span(0, len(past)), span(self.position, len(chunk)))


@dataclass(frozen=True, slots=True)
class Flex(Absolute):
    """Absolute, with the slow temporal frequencies scaled for a longer video (after FLEX).

    A frequency that turns at most `lo` times in the `trained` frames is multiplied by `scale`, one
    that turns `hi` times or more stays, and those between change in proportion. A scale of 1
    changes none; trained / wanted frames takes the whole video into the trained range.
    """

    name: ClassVar[str] = "flex"

    scale: float = 0.25
    lo: float = 1.0
    hi: float = 4.0
    trained: int = 21  # latent frames

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1 or not 0 <= self.lo < self.hi or self.trained < 1:
            raise ValueError(
                f"flex with scale {self.scale:g}, lo {self.lo:g}, hi {self.hi:g}, trained"
                f" {self.trained}: give a scale above 0 and up to 1, turns lo below hi, and at"
                " least 1 trained frame"
            )

    def frequencies(self, head_dim: int) -> tuple[float, ...]:
        return scale_frequencies(frequencies_of(axis_pairs(head_dim)[0]), self)


@lru_cache
def scale_frequencies(frequencies: tuple[float, ...], flex: Flex) -> tuple[float, ...]:
    """Scale frequencies (radians a frame) by w (g + (1 − g) s), with g from 0 to 1 by turns."""
    factors = []
    for frequency in frequencies:
        turns = flex.trained * frequency / (2 * pi)
        share = min(max((turns - flex.lo) / (flex.hi - flex.lo), 0.0), 1.0)
        factors.append(1 - (1 - share) * (1 - flex.scale))  # exactly 1 at a scale of 1
    return tuple(w * factor for w, factor in zip(frequencies, factors, strict=True))


def check_cut(positions: Positions) -> None:
    """Raise ValueError unless positions are relative, which a cut needs."""
    if not isinstance(positions, Relative):
        raise ValueError(
            "a cut moves the next chunk away from its history: it needs relative positions, this"
            f" run's are {positions.name}; use another transition, like `flush 1`"
        )


POSITIONS: dict[str, Callable[..., Positions]] = {
    kind.name: kind for kind in (Absolute, Relative, SinkAdjacent, Flex)
}
