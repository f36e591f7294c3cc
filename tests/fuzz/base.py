"""Shared parts of the hostile inputs: attempts, damaged bytes and hostile values."""

import copy
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from autorefiner.nodes.cli import add_run, run
from autorefiner.refiner.cli import main

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\u202e"
TEXTS = (
    "", " ", "\0", ESCAPES, "a" * 70_000, "../secret/secret.png", "/etc/passwd", "../" * 200,
    "a/" * 2000, "CON", "%s%n", "\ud800", "😀" * 300, "-1", "nan", "1e999", "0x10", "[]",
    "file:///etc/passwd", "http://127.0.0.1:9/x", "%date:" * 50,
)  # fmt: skip
NUMBERS = (
    -1,
    0,
    1,
    2,
    3.5,
    -0.0,
    2**31,
    2**63,
    2**64,
    10**400,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    True,
)
ODD = (
    None,
    [],
    {},
    [[]],
    {"": None},
    [["1", 0]],
    ["1", 99],
    ["1", -1],
    [None, None],
    [1] * 1000,
    {"__proto__": {}},
)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A hostile input and the action on it; a one-line ValueError or OSError is correct."""

    name: str
    act: Callable[[], object]


def command(*arguments: str | Path) -> Callable[[], NoReturn]:
    """Return an action that runs the command line and exits with its status."""
    return lambda: sys.exit(main([str(one) for one in arguments], {"run": (add_run, run)}))


def hostile_value(choose: random.Random) -> object:
    """Return a random hostile value."""
    return copy.deepcopy(choose.choice((*TEXTS, *NUMBERS, *ODD)))


def damaged(content: bytes, choose: random.Random) -> bytes:
    """Return a copy with bits flipped, a part cut, doubled or overwritten, or the end cut off."""
    data = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 8, 64))):
        if not data:
            break
        at, length = choose.randrange(len(data)), choose.choice((1, 2, 4, 8, 100, 1000))
        way = choose.randrange(6)
        if way == 0:
            data[at] ^= 1 << choose.randrange(8)
        elif way == 1:
            data[at : at + length] = b""
        elif way == 2:
            data[at:at] = data[at : at + length]
        elif way == 3:
            data[at : at + length] = choose.randbytes(min(length, len(data) - at))
        elif way == 4:
            data[at : at + 4] = choose.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80")
            )
        else:
            del data[at:]
    return bytes(data)


def changed(document: object, choose: random.Random) -> object:
    """Return a copy of a JSON document with a few values replaced, removed or duplicated."""
    result = json.loads(json.dumps(document))
    for _ in range(choose.choice((1, 1, 1, 2, 5))):
        places = list(_places(result))
        if not places:
            break
        holder, key = choose.choice(places)
        way = choose.randrange(8)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[choose.choice(TEXTS)] = holder.pop(key)
        elif way == 2:
            other, place = choose.choice(places)
            if isinstance(other, list) and isinstance(place, int) and place >= len(other):
                continue
            holder[key] = json.loads(
                json.dumps(other.get(place) if isinstance(other, dict) else other[place])
            )
        elif way == 3:
            nested: object = 1
            for _ in range(choose.choice((10, 900))):
                nested = [nested]
            holder[key] = nested
            break  # nested too deeply for _places
        else:
            holder[key] = hostile_value(choose)
    return result


def _places(value: object):
    """Return (container, key) of every value in a document."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


def as_json(document: object) -> bytes:
    """Serialise to JSON, lone surrogates included."""
    return json.dumps(document, ensure_ascii=True).encode()
