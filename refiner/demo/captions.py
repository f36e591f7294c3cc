"""What a caption says of a clip, and the grammar with synonyms that says it. The words are a closed
vocabulary."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from numpy.random import Generator

from .palette import GROUND_COLOURS

RELATIONS = (
    "left",
    "right",
    "above",
    "below",
    "behind",
    "front",
)  # of the first object to the second
MOST_WORDS = 32  # that the sprites' text encoder reads


@dataclass(frozen=True, slots=True)
class Stated:
    """What is said of one object; None is what is not said. Names are those of the world, not the
    synonyms."""

    shape: str
    colour: str
    motion: str
    size: str | None = None
    direction: str | None = None
    speed: str | None = None


@dataclass(frozen=True, slots=True)
class Caption:
    """A text, and the attributes that it states: the objects in its order, and how the first lies
    to the second."""

    text: str
    objects: tuple[Stated, ...]
    relation: str | None = None
    ground: str | None = None


SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
COLOUR_WORDS = {
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "grey": ("grey", "gray"),
}
COLOUR_WORDS |= {
    name: (name,) for name in ("red", "yellow", "green", "blue", "white", "black", "navy", "brown")
}
COLOUR_WORDS |= {"olive": ("olive",)}
SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
}
SPEED_WORDS = {"slow": ("slowly", "gently"), "fast": ("quickly", "rapidly")}
DIRECTION_WORDS = {
    **{name: (name,) for name in ("left", "right", "up", "down", "clockwise")},
    **{f"{a} {b}": (f"{a} and {b}",) for a in ("up", "down") for b in ("left", "right")},
    "counterclockwise": ("counterclockwise", "anticlockwise"),
}
# Verbs by motion: where the direction is said, and where it is not.
VERBS = {
    "bounce": (("moves {} and bounces", "travels {} and bounces"), ("bounces", "bounces around")),
    "pass": (("moves {} and passes", "travels {} and passes"), ("passes", "goes")),
    "orbit": (
        ("circles {}", "orbits {}", "moves {} in a circle"),
        ("circles", "orbits", "moves in a circle"),
    ),
    "swing": ((), ("swings", "moves back and forth")),
    "pulse": ((), ("pulsates", "grows and shrinks", "swells and shrinks")),
    "spin": (("spins {}", "rotates {}", "turns {}"), ("spins", "rotates", "turns")),
    "still": ((), ("stays still", "rests", "does not move")),
}
SWING_VERBS = {
    "horizontal": ("swings left and right", "moves from side to side"),
    "vertical": ("bobs up and down", "moves up and down"),
}
RELATION_WORDS = {
    "left": ("to the left of",),
    "right": ("to the right of",),
    "above": ("above",),
    "below": ("below", "under"),
    "behind": ("behind",),
    "front": ("in front of",),
}
GROUND_WORDS = ("ground", "background", "backdrop")
GLUE = ("a", "an", "on", "of", "over", "that", "and", "while")
TABLES = (
    SIZE_WORDS,
    COLOUR_WORDS,
    SHAPE_WORDS,
    SPEED_WORDS,
    DIRECTION_WORDS,
    VERBS,
    SWING_VERBS,
    RELATION_WORDS,
)


def words(text: str) -> list[str]:
    """The words of a text: lower case, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def _phrases(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        yield from _phrases(tuple(entry.values()))
    elif isinstance(entry, Iterable):
        for part in entry:
            yield from _phrases(part)


def vocabulary() -> list[str]:
    """Every word that a caption can have, sorted."""
    return sorted(
        {word for phrase in _phrases((*TABLES, GROUND_WORDS, GLUE)) for word in words(phrase)}
    )


def unknown_words(text: str) -> list[str]:
    """Words of a text that the world has no meaning for, in order."""
    known = set(vocabulary())
    return [word for word in dict.fromkeys(words(text)) if word not in known]


def misread(text: str) -> list[str]:
    """Warn of words that the models have never read, and of what no caption says, a line each."""
    unknown, read = ", ".join(map(repr, unknown_words(text)[:5])), words(text)
    lines = []
    if unknown:
        lines.append(f"the sprites do not know {unknown}: what they do know is in the README")
    if len(read) > MOST_WORDS:
        last = " ".join(read[:MOST_WORDS][-4:])
        lines.append(f"the sprites read {MOST_WORDS} words of {len(read)}: up to …{last!r}")
    return lines + unlike_captions(text)


def unlike_captions(text: str) -> list[str]:
    """Warn of a ground in a colour that no ground has, and of objects without a motion.

    The models know captions alone, and make something else of such a text.
    """
    read, lines = words(text), []
    grounds = {word for name in GROUND_COLOURS for word in COLOUR_WORDS[name]}
    colours = {word for synonyms in COLOUR_WORDS.values() for word in synonyms}
    for before, word in pairwise(read):
        if word in GROUND_WORDS and before in colours - grounds:
            theirs = ", ".join(GROUND_COLOURS)
            lines.append(f"the sprites have no {before} {word}: theirs are {theirs}")
    verbs = {words(phrase)[0] for phrase in _phrases((VERBS, SWING_VERBS))}
    for noun, rest in _objects(read):
        if not verbs & {*rest}:
            lines.append(f"the {noun} has no motion: say one of each object, as 'that stays still'")
    return lines


def _objects(read: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each shape's noun, and the words up to the next one; not the circle of `in a circle`."""
    shapes = {*_phrases(SHAPE_WORDS)}
    nouns = [place for place, word in enumerate(read) if word in shapes]
    nouns = [place for place in nouns if read[max(place - 2, 0)] != "in"]
    for start, end in pairwise([*nouns, len(read)]):
        yield read[start], read[start + 1 : end]


def _pick(rng: Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun(stated: Stated, rng: Generator) -> str:
    size = [_pick(rng, SIZE_WORDS[stated.size])] if stated.size else []
    parts = [
        "a",
        *size,
        _pick(rng, COLOUR_WORDS[stated.colour]),
        _pick(rng, SHAPE_WORDS[stated.shape]),
    ]
    return " ".join(parts)


def _verb(stated: Stated, rng: Generator, passing: bool = False) -> str:
    directed, plain = VERBS["pass" if passing else stated.motion]
    if stated.motion == "swing" and stated.direction:
        verb = _pick(rng, SWING_VERBS[stated.direction])
    elif stated.direction:
        verb = _pick(rng, directed).format(_pick(rng, DIRECTION_WORDS[stated.direction]))
    else:
        verb = _pick(rng, plain)
    if stated.speed is None:
        return verb
    speed = _pick(rng, SPEED_WORDS[stated.speed])
    return f"{speed} {verb}" if passing or rng.random() < 0.5 else f"{verb} {speed}"


def _ground(name: str, rng: Generator) -> str:
    noun = _pick(rng, GROUND_WORDS)
    tones = [_pick(rng, COLOUR_WORDS[tone]) for tone in name.split(" over ")]
    if len(tones) == 2:
        return f"on a {noun} of {tones[0]} over {tones[1]}"
    return f"on {'an' if tones[0][0] in 'aeiou' else 'a'} {tones[0]} {noun}"


def write(
    objects: tuple[Stated, ...], relation: str | None, ground: str | None, rng: Generator
) -> Caption:
    """A caption that states exactly this, in words drawn from `rng`."""
    passing = relation in ("behind", "front")
    text = f"{_noun(objects[0], rng)} {_verb(objects[0], rng, passing)}"
    if len(objects) == 2:
        other = f"{_noun(objects[1], rng)} {{}}{_verb(objects[1], rng)}"
        if relation:
            text = f"{text} {_pick(rng, RELATION_WORDS[relation])} {other.format('that ')}"
        else:
            text = f"{text} {_pick(rng, ('and', 'while'))} {other.format('')}"
    if ground:
        where = _ground(ground, rng)
        text = f"{where} {text}" if rng.random() < 0.25 else f"{text} {where}"
    return Caption(text, objects, relation, ground)
