"""Compare a host with NodeHost, also inside ComfyUI's interpreter."""

from collections.abc import Iterable
from inspect import Parameter, getmembers, isfunction, signature
from itertools import zip_longest
from typing import Any


def mismatches(protocol: type, host: Any) -> dict[str, str]:
    """What is wrong with a host's functions, by name; empty where it satisfies the protocol."""
    wrong = {}
    for name, method in getmembers(protocol, isfunction):
        if name.startswith("_"):
            continue
        function = getattr(host, name, None)
        _, *expected = signature(method).parameters.values()  # without self
        if function is None:
            wrong[name] = "missing"
        elif not fits(signature(function).parameters.values(), expected):
            wrong[name] = f"{signature(function)}, expected {signature(method)}"
    return wrong


def fits(parameters: Iterable[Parameter], expected: Iterable[Parameter]) -> bool:
    return all(matches(actual, wanted) for actual, wanted in zip_longest(parameters, expected))


def matches(actual: Parameter | None, expected: Parameter | None) -> bool:
    """Whether a host's parameter takes what nodes give; one beyond the protocol's needs a
    default."""
    if actual is None or expected is None:
        return actual is not None and actual.default is not Parameter.empty
    same_default = expected.default in (Parameter.empty, actual.default)
    return (actual.name, actual.kind) == (expected.name, expected.kind) and same_default
