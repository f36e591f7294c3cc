"""Memory policies by the name that users give."""

from collections.abc import Callable

from ..policy import Policy
from .deep_sink import DeepSink
from .ema_sink import EmaSink
from .head_windows import HeadWindows
from .merge import Merge
from .pooled import Pooled
from .rolling_sink import RollingSink
from .top_frames import TopFrames
from .window import Window

POLICIES: dict[str, Callable[..., Policy]] = {
    "window": Window,
    "top-frames": TopFrames,
    "ema-sink": EmaSink,
    "rolling-sink": RollingSink,
    "pooled": Pooled,
    "deep-sink": DeepSink,
    "head-windows": HeadWindows,
    "merge": Merge,
}

__all__ = [
    "POLICIES", "DeepSink", "EmaSink", "HeadWindows", "Merge", "Pooled", "RollingSink",
    "TopFrames", "Window",
]  # fmt: skip
