"""Objects that are compared by identity: a MODEL, a REFINER, a REWARD."""

import itertools
from typing import Any
from weakref import ref


class Referable:
    """Base of slotted dataclasses that can be referred to weakly."""

    __slots__ = ("__weakref__",)


class Identities:
    """Numbers of objects that are compared by identity; a number is never given twice."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref, int]] = {}
        self._numbers = itertools.count()

    def of(self, value: Any) -> int | None:
        """Return an object's number; None for None."""
        if value is None:
            return None
        known = self._known.get(id(value))
        if known is None or known[0]() is not value:
            self._known = {key: each for key, each in self._known.items() if each[0]() is not None}
            known = self._known[id(value)] = (ref(value), next(self._numbers))
        return known[1]
