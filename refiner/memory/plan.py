"""What a memory holds, decided and counted in bytes before anything is allocated."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..wan.transformer import PATCH, WanConfig

Keys = Literal["rotated", "raw"]
Positions = Literal["absolute", "window"]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes and policy of a K/V memory.

    `window_frames` latent frames are held: the sink (the first `sink_frames` of the video), the most recent past and
    the current chunk. A window as long as the video is full history.
    Keys lie in memory rotated by RoPE (the reference), or raw and are rotated on every read. Positions are `absolute`
    (the frame's index in the video) or, with raw keys, `window` (the frame's rank among those held, so that distances
    stay inside the training range at any length; LongLive's infinite variant, Infinity-RoPE's block-relativistic RoPE).
    """

    layers: int
    heads: int
    head_dim: int
    batch: int
    height: int  # of the patch grid: tokens a column
    width: int  # of the patch grid: tokens a row
    window_frames: int
    sink_frames: int = 0
    keys: Keys = "rotated"
    positions: Positions = "absolute"
    dtype: torch.dtype = torch.float32
    spare_frames: int = 0  # places behind the window for what a refine pass writes and nothing keeps

    def __post_init__(self) -> None:
        if self.sink_frames < 0 or self.window_frames <= self.sink_frames:
            raise ValueError(
                f"window of {self.window_frames} frames with a sink of {self.sink_frames}: the window counts sink, past"
                f" and current chunk, so it must be larger than the sink; raise the window or lower the sink"
            )
        if self.keys not in ("rotated", "raw") or self.positions not in ("absolute", "window"):
            raise ValueError(f"keys {self.keys!r}, positions {self.positions!r}: expected rotated|raw, absolute|window")
        if self.positions == "window" and self.keys == "rotated":
            raise ValueError("window positions move as the window does: they need keys='raw'")

    @classmethod
    def of(
        cls,
        config: WanConfig,
        shape: tuple[int, ...],
        *,
        window_frames: int = -1,
        sink_frames: int = 0,
        keys: Keys = "rotated",
        positions: Positions = "absolute",
        dtype: torch.dtype = torch.float32,
        spare_frames: int = 0,
    ) -> "MemoryPlan":
        """For latents of `shape` [B, C, F, h, w], F being every frame that is read or made; -1 is full history."""
        batch, _, frames, height, width = shape
        if window_frames < 0 or window_frames >= frames:  # nothing is ever evicted, so there is nothing to protect
            window_frames, sink_frames = frames, 0
        return cls(
            config.num_layers, config.num_heads, config.head_dim, batch, height // PATCH[1], width // PATCH[2],
            window_frames, sink_frames, keys, positions, dtype, spare_frames,
        )  # fmt: skip

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width

    @property
    def recent_frames(self) -> int:
        """Frames of the window behind the sink: the recent past and the current chunk."""
        return self.window_frames - self.sink_frames

    @property
    def held_frames(self) -> int:
        """Frames that there is room for."""
        return self.window_frames + self.spare_frames

    @property
    def layer_bytes(self) -> int:
        """Of the keys (or values) of one layer."""
        return self.batch * self.held_frames * self.frame_tokens * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of all keys and values; raw keys need room for one layer's rotated ones besides."""
        return self.layer_bytes * (2 * self.layers + (self.keys == "raw"))

    def check_chunk(self, frames: int) -> None:
        """Raise ValueError when the sink and a chunk of `frames` do not fit in the window together."""
        if frames > self.recent_frames:
            raise ValueError(
                f"window of {self.window_frames} frames is smaller than sink {self.sink_frames} + chunk {frames}: use a"
                f" window of at least {self.sink_frames + frames}"
            )
