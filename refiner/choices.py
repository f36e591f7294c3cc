"""Choices with knobs, as text: `self-refine`, `top-frames:k=4,recent=6`."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from math import isnan
from typing import TypeVar

Made = TypeVar("Made")
KINDS = {int: int, float: float, str: str, "int": int, "float": float, "str": str}


def knobs(make: Callable) -> dict[str, Parameter]:
    """Return the arguments of a function that text can set: int, float or str, with a default."""
    parameters = signature(make).parameters.values()
    return {
        each.name: each
        for each in parameters
        if each.annotation in KINDS and each.default is not Parameter.empty
    }


def counts(make: Callable) -> Parameter | None:
    """Return the argument that counts by number, such as repeats by level; text sets `750=3`."""
    parameters = signature(make).parameters.values()
    return next((each for each in parameters if each.annotation == Mapping[int, int]), None)


def choose(text: str, table: Mapping[str, Callable[..., Made]], kind: str) -> Made:
    """Call the function that `text` names, with its knobs; ValueError lists names or knobs.

    `kind` is the word for what is chosen, in messages.
    """
    name, _, settings = text.partition(":")
    if name not in table:
        raise ValueError(f"{kind} {name!r} is not known: use one of {', '.join(table)}")
    known, values = knobs(table[name]), {}
    counted = counts(table[name])
    numbers = dict(counted.default) if counted else {}
    for setting in filter(None, settings.split(",")):
        knob, _, value = (part.strip() for part in setting.partition("="))
        if counted and knob.isdecimal():
            numbers[int(knob)] = _number(f"{kind} {name}, {knob}", value, int)
            continue
        if knob not in known:
            defaults = numbers | {each.name: each.default for each in known.values()}
            listed = ", ".join(f"{knob}={_shown(value)}" for knob, value in defaults.items())
            raise ValueError(
                f"{kind} {name} has no knob {knob!r}: its knobs are {listed or 'none'}"
            )
        parse = KINDS[known[knob].annotation]
        values[knob] = value if parse is str else _number(f"{kind} {name}, {knob}", value, parse)
    if counted:
        values[counted.name] = numbers
    return table[name](**values)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _number(place: str, value: str, number: Callable[[str], float]) -> float:
    wanted = "a whole number" if number is int else "a number"
    try:
        parsed = number(value)
    except ValueError:
        raise ValueError(f"{place} {value!r}: give {wanted}") from None
    if isnan(parsed):
        raise ValueError(f"{place} {value!r}: give {wanted}")
    return parsed
