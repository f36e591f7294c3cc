"""A recipe: which chunks of a clip are rerolled, and where it ends, as a user chose."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .noise.source import NoiseSource, RerolledNoise, Rerolls, take_of
from .run_plan import RunPlan
from .schedule import chunk_lengths

LONGEST = 2000  # characters
MOST = 4096  # chunks, takes
COMMAND = re.compile(r"(reroll|keep|extend)\s+(\d{1,6})(?:\s+(\d{1,6}))?", re.ASCII)
GRAMMAR = "write `reroll CHUNK [TIMES]`, `keep CHUNK` or `extend CHUNKS`, with ; between"


@dataclass(frozen=True, slots=True)
class Command:
    """A step of a recipe; chunks are counted from 1, given ones included."""

    verb: str  # reroll | keep | extend
    number: int  # chunk, or chunks to add
    times: int = 1  # takes that a reroll goes on by


@dataclass(frozen=True, slots=True)
class Recipe:
    """Commands in order.

    `reroll I N` draws chunk I and all later ones in the take N after their present one. `keep N`
    ends the clip after chunk N. `extend N` adds as many frames as N chunks have.
    """

    commands: tuple[Command, ...] = ()

    def __str__(self) -> str:
        texts = []
        for command in self.commands:
            times = f" {command.times}" if command.times > 1 else ""
            texts.append(f"{command.verb} {command.number}{times}")
        return "; ".join(texts)

    def frames(self, plan: RunPlan) -> int:
        """Return the latent frames of the clip, given ones included, that `plan` becomes.

        Raises ValueError for an endless run, and for a reroll or an end among the given chunks or
        after the last one.
        """
        if plan.endless:
            raise ValueError(f"recipe {self}: an endless run cannot be rerolled, cut or extended")
        lengths = list(plan.lengths)
        for command in self.commands:
            self._check(command, len(plan.given_chunks), len(lengths))
            if command.verb == "keep":
                lengths = lengths[: command.number]
            elif command.verb == "extend":
                lengths = _extended(lengths, command.number, plan)
        return sum(lengths)

    @property
    def ends(self) -> bool:
        """Whether the clip ends before its length says."""
        return any(command.verb == "keep" for command in self.commands)

    @property
    def rerolls(self) -> Rerolls:
        """The rerolls, by a chunk's index."""
        rerolls = (command for command in self.commands if command.verb == "reroll")
        return tuple((command.number - 1, command.times) for command in rerolls)

    def take(self, index: int) -> int:
        """Return the take of the chunk of an index."""
        return take_of(index, self.rerolls)

    def noise(self, source: NoiseSource) -> NoiseSource:
        """Return a source with the takes of this recipe; the same where nothing is rerolled."""
        return RerolledNoise(source, self.rerolls) if self.rerolls else source

    def _check(self, command: Command, given: int, count: int) -> None:
        if command.verb == "extend" or given < command.number <= count:
            return
        if command.verb == "keep" and command.number > count:
            return  # the clip is shorter already
        fresh = f"chunks {given + 1} to {count}" if count > given else "none"
        raise ValueError(
            f"recipe, {command.verb} {command.number}: the run samples {fresh}, choose one of them"
        )


def _extended(lengths: list[int], chunks: int, plan: RunPlan) -> list[int]:
    """Add the frames of so many chunks; a shorter last chunk is filled up first."""
    given, chunk = len(plan.given_chunks), plan.preset.chunk
    frames = sum(lengths[given:]) + chunks * chunk
    return lengths[:given] + chunk_lengths(frames, chunk, plan.preset.first_alone and not given)


def parse_recipe(text: str) -> Recipe:
    """Parse commands separated by `;`. ValueError names the one that cannot be read."""
    if len(text) > LONGEST:
        raise ValueError(f"recipe of {len(text)} characters: give at most {LONGEST}")
    return Recipe(tuple(_commands(text)))


def _commands(text: str) -> Iterator[Command]:
    for part in filter(None, map(str.strip, text.split(";"))):
        match = COMMAND.fullmatch(part)
        if match is None or (match[3] and match[1] != "reroll"):
            raise ValueError(f"recipe {part[:40]!r}: {GRAMMAR}")
        number, times = int(match[2]), int(match[3] or 1)
        if not (1 <= number <= MOST and 1 <= times <= MOST):
            raise ValueError(f"recipe {part[:40]!r}: numbers are 1 to {MOST}")
        yield Command(match[1], number, times)
