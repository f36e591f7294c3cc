"""Sampling methods: one a file, each a short generator over the verbs of a rollout that yields every chunk's x0."""

from .ode import ode
from .search import BestOfN, SearchOverPath
from .self_forcing import self_forcing
from .self_refine import SelfRefine

# Those that need no verifier, by the name that users give.
SAMPLERS = {"self-forcing": self_forcing, "ode": ode, "self-refine": SelfRefine()}
# And those that are made of one and a number of candidates.
SEARCHES = {"best-of-n": BestOfN, "search-over-path": SearchOverPath}

__all__ = ["SAMPLERS", "SEARCHES", "BestOfN", "SearchOverPath", "SelfRefine", "ode", "self_forcing"]
