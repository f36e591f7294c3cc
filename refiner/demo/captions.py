"""Captions: the attributes they state, and a grammar with synonyms over a closed vocabulary."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from numpy.random import Generator

from .palette import GROUND_COLOURS

# of the first object to the second
RELATIONS = ("left", "right", "above", "below", "behind", "front")
MOST_WORDS = 32  # longest text of the sprites' text encoder


@dataclass(frozen=True, slots=True)
class Stated:
    """Stated attributes of an object, by the world's names, not synonyms; None if not stated."""

    shape: str
    colour: str
    motion: str
    size: str | None = None
    direction: str | None = None
    speed: str | None = None


@dataclass(frozen=True, slots=True)
class Caption:
    """A text and the attributes it states: objects in its order, their relation, and the ground."""

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
# Verbs by motion: with the direction stated, and without.
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
    """Split a text into lower-case words without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def _phrases(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        yield from _phrases(tuple(entry.values()))
    elif isinstance(entry, Iterable):
        for item in entry:
            yield from _phrases(item)


def vocabulary() -> list[str]:
    """Return every word that a caption can contain, sorted."""
    return sorted(
        {word for phrase in _phrases((*TABLES, GROUND_WORDS, GLUE)) for word in words(phrase)}
    )


def unknown_words(text: str) -> list[str]:
    """Return a text's words outside the vocabulary, in order."""
    known = set(vocabulary())
    return [word for word in dict.fromkeys(words(text)) if word not in known]


def misread(text: str) -> list[str]:
    """Return warnings, one line each, of unknown words and of texts unlike any caption."""
    unknown, read = ", ".join(map(repr, unknown_words(text)[:5])), words(text)
    lines = []
    if unknown:
        lines.append(f"the sprites do not know {unknown}: what they do know is in the README")
    if len(read) > MOST_WORDS:
        last = " ".join(read[:MOST_WORDS][-4:])
        lines.append(f"the sprites read {MOST_WORDS} words of {len(read)}: up to …{last!r}")
    return lines + unlike_captions(text)


def unlike_captions(text: str) -> list[str]:
    """Return warnings of a ground in an object's colour, and of objects without a motion.

    The models have seen captions only, and misread such texts.
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
    """Yield each shape's noun, except in `in a circle`, with the words up to the next noun."""
    shapes = {*_phrases(SHAPE_WORDS)}
    nouns = [place for place, word in enumerate(read) if word in shapes]
    nouns = [place for place in nouns if read[max(place - 2, 0)] != "in"]
    for start, end in pairwise([*nouns, len(read)]):
        yield read[start], read[start + 1 : end]


def _pick(rng: Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun(stated: Stated, rng: Generator) -> str:
    size = [_pick(rng, SIZE_WORDS[stated.size])] if stated.size else []
    colour = _pick(rng, COLOUR_WORDS[stated.colour])
    return " ".join(["a", *size, colour, _pick(rng, SHAPE_WORDS[stated.shape])])


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
    """Write a caption that states exactly these attributes, in words drawn from `rng`."""
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
