"""Check that a host satisfies NodeHost; also runs in ComfyUI's interpreter."""

from collections.abc import Iterable
from inspect import Parameter, getmembers, isfunction, signature
from itertools import zip_longest
from typing import Any


def mismatches(protocol: type, host: Any) -> dict[str, str]:
    """Return the problems of a host's functions by name; empty if it satisfies the protocol."""
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
    """Return whether a host's parameter accepts the protocol's; extra ones need a default."""
    if actual is None or expected is None:
        return actual is not None and actual.default is not Parameter.empty
    same_default = expected.default in (Parameter.empty, actual.default)
    return (actual.name, actual.kind) == (expected.name, expected.kind) and same_default
