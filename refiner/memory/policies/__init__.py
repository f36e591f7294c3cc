"""Memory policies by the name that users give."""

from collections.abc import Callable

from ..policy import Policy
from .top_frames import TopFrames
from .window import Window

POLICIES: dict[str, Callable[..., Policy]] = {"window": Window, "top-frames": TopFrames}

__all__ = ["POLICIES", "TopFrames", "Window"]
