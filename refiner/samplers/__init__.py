"""Sampling methods: one a file, each a short generator over the verbs of a rollout that yields every chunk's x0."""

from .ode import ode
from .self_forcing import self_forcing

SAMPLERS = {"self-forcing": self_forcing, "ode": ode}

__all__ = ["SAMPLERS", "ode", "self_forcing"]
