"""Sampling methods, one a file: a short generator over the verbs of a rollout, and a function that
sets its knobs."""

from collections.abc import Callable

from .hiar import hiar
from .method import Method
from .ode import ode
from .search import best_of_n, search_over_path
from .self_forcing import self_forcing
from .self_refine import self_refine

# By the name that users give. Arguments are knobs.
SAMPLERS: dict[str, Callable[..., Method]] = {
    "self-forcing": self_forcing,
    "ode": ode,
    "self-refine": self_refine,
    "hiar": hiar,
}
# These take a verifier first.
SEARCHES: dict[str, Callable[..., Method]] = {
    "best-of-n": best_of_n,
    "search-over-path": search_over_path,
}
METHODS = SAMPLERS | SEARCHES

__all__ = [
    "METHODS", "SAMPLERS", "SEARCHES", "Method", "best_of_n", "hiar", "ode", "search_over_path",
    "self_forcing", "self_refine",
]  # fmt: skip
