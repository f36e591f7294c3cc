"""Sampling methods, one a file: a generator over a rollout, and a function that sets knobs."""

from collections.abc import Callable

from .hiar import hiar
from .method import Method
from .ode import ode
from .rolling import rolling
from .search import best_of_n, search_over_path
from .self_forcing import self_forcing
from .self_refine import self_refine
from .ttc import ttc

# By the name that users give. Arguments are knobs.
SAMPLERS: dict[str, Callable[..., Method]] = {
    "self-forcing": self_forcing,
    "ode": ode,
    "self-refine": self_refine,
    "hiar": hiar,
    "rolling": rolling,
    "ttc": ttc,
}
# These take a verifier first.
SEARCHES: dict[str, Callable[..., Method]] = {
    "best-of-n": best_of_n,
    "search-over-path": search_over_path,
}
METHODS = SAMPLERS | SEARCHES
# Former names, for scripts.
SelfRefine, BestOfN, SearchOverPath = self_refine, best_of_n, search_over_path


def as_method(method: Method | Callable) -> Method:
    """Return a method; also for a function of `SAMPLERS` and for a bare generator function."""
    if isinstance(method, Method):
        return method
    if not callable(method):
        raise ValueError(f"method {method!r}: give a Method, like self_forcing()")
    if method in SAMPLERS.values():
        return method()
    return Method(getattr(method, "__name__", "custom"), method)


__all__ = [
    "METHODS", "SAMPLERS", "SEARCHES", "BestOfN", "Method", "SearchOverPath", "SelfRefine",
    "as_method", "best_of_n", "hiar", "ode", "rolling", "search_over_path", "self_forcing",
    "self_refine", "ttc",
]  # fmt: skip
