"""Temporal RoPE positions of stored frames and of the current chunk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from ..wan.rope import span


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


@dataclass(frozen=True, slots=True)
class Absolute:
    """The position of a frame is its index in the video (Self-Forcing)."""

    name: ClassVar[str] = "absolute"
    moving: ClassVar[bool] = False

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        return Placement(tuple(past), tuple(chunk))


@dataclass(frozen=True, slots=True)
class Relative:
    """The position of a frame is its rank in the window: distances stay in the training range.

    LongLive's infinite variant; the block-relativistic RoPE of Infinity-RoPE.
    """

    name: ClassVar[str] = "relative"
    moving: ClassVar[bool] = True

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        return Placement(span(0, len(past)), span(len(past), len(chunk)))


@dataclass(frozen=True, slots=True)
class SinkAdjacent:
    """Absolute, with the sink right before the oldest recent frame (Rolling Forcing)."""

    name: ClassVar[str] = "sink-adjacent"
    moving: ClassVar[bool] = True

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        recent = (*past[sink:], *chunk)
        moved = span(recent[0] - len(past[:sink]), len(past[:sink]))
        return Placement((*moved, *past[sink:]), tuple(chunk))


@dataclass(frozen=True, slots=True)
class Cut:
    """Relative, with the chunk at `position`, away from its history (RoPE cut of Infinity-RoPE)."""

    name: ClassVar[str] = "cut"
    moving: ClassVar[bool] = True

    position: int = 45

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        return Placement(span(0, len(past)), span(self.position, len(chunk)))


POSITIONS: dict[str, Positions] = {
    kind.name: kind for kind in (Absolute(), Relative(), SinkAdjacent())
}


def get_positions(name: str) -> Positions:
    """Look up positions by name; ValueError lists the names."""
    if name not in POSITIONS:
        raise ValueError(f"positions {name!r} are not known: use one of {', '.join(POSITIONS)}")
    return POSITIONS[name]
