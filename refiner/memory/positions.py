"""Temporal RoPE positions: at which index a stored frame is read, and where the current chunk
stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from ..wan.rope import span


class Placement(NamedTuple):
    """Temporal positions of the visible past, oldest first, and of the chunk."""

    past: tuple[int, ...]
    chunk: tuple[int, ...]


class Positions(Protocol):
    """How frames are placed. `moving` positions change from chunk to chunk, so keys are stored
    before RoPE."""

    name: ClassVar[str]
    moving: ClassVar[bool]

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        """Place visible frames and a chunk, given by absolute latent index; the first `sink` of the
        past are sink."""
        ...


@dataclass(frozen=True, slots=True)
class Absolute:
    """A frame stands at its index in the video (Self-Forcing)."""

    name: ClassVar[str] = "absolute"
    moving: ClassVar[bool] = False

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        return Placement(tuple(past), tuple(chunk))


@dataclass(frozen=True, slots=True)
class Relative:
    """A frame stands at its rank in the window, so distances stay in the training range at any
    length.

    LongLive's infinite variant; the block-relativistic RoPE of Infinity-RoPE.
    """

    name: ClassVar[str] = "relative"
    moving: ClassVar[bool] = True

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        return Placement(span(0, len(past)), span(len(past), len(chunk)))


@dataclass(frozen=True, slots=True)
class SinkAdjacent:
    """Absolute positions, but the sink stands right before the oldest recent frame (Rolling
    Forcing)."""

    name: ClassVar[str] = "sink-adjacent"
    moving: ClassVar[bool] = True

    def place(self, past: Sequence[int], chunk: Sequence[int], sink: int) -> Placement:
        recent = (*past[sink:], *chunk)
        moved = span(recent[0] - len(past[:sink]), len(past[:sink]))
        return Placement((*moved, *past[sink:]), tuple(chunk))


@dataclass(frozen=True, slots=True)
class Cut:
    """Relative positions whose chunk jumps to `position`, away from its history (RoPE cut of
    Infinity-RoPE)."""

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
