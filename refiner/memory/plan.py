"""Plan a K/V memory: check its sizes and count its bytes before anything is allocated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..wan.rope import rotate, rotation_table
from ..wan.transformer import PATCH, WanConfig
from .policies import Window
from .policy import Policy
from .positions import Absolute, Positions
from .store import PlainStore, Slots, Store

Keys = Literal["rotated", "raw"]


@dataclass(frozen=True, slots=True)
class FirstFrames:
    """Name of a cache in which a chunk sees nothing but the first frames of the video."""

    frames: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of a K/V memory, and how it is read.

    The memory holds `window_frames` latent frames: the sink (the first `sink_frames` of the video),
    the most recent past and the current chunk. A window as long as the video is full history. Keys
    are stored rotated by RoPE (as in the reference), or raw and rotated on every read, which moving
    positions need.
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
    positions: Positions = field(default_factory=Absolute)
    dtype: torch.dtype = torch.float32
    spare_frames: int = 0  # slots after the window for the tokens of a refine pass
    policy: Policy = field(default_factory=Window)
    store: type[Store] = PlainStore
    evicts: bool = True  # False where the window holds the whole clip
    rope: Callable[[Tensor, Tensor], Tensor] = rotate  # rotates keys by a table

    def __post_init__(self) -> None:
        if self.sink_frames < 0 or self.window_frames <= self.sink_frames:
            raise ValueError(
                f"window of {self.window_frames} frames with a sink of {self.sink_frames}: the"
                " window counts sink, past and current chunk, so it must be larger than the sink;"
                " raise the window or lower the sink"
            )
        if self.keys not in ("rotated", "raw"):
            raise ValueError(f"keys {self.keys!r}: expected rotated or raw")
        if self.positions.moving and self.keys == "rotated":
            raise ValueError(
                f"{self.positions.name} positions move with the window: they need keys='raw'"
            )
        if self.policy.raw and self.keys == "rotated":
            raise ValueError(
                f"memory {self.policy.name} moves or averages keys: it needs keys='raw'"
            )
        self.policy.check(self)

    @classmethod
    def of(
        cls,
        config: WanConfig,
        shape: tuple[int, ...],
        *,
        window_frames: int = -1,
        sink_frames: int = 0,
        keys: Keys | None = None,
        positions: Positions | None = None,
        dtype: torch.dtype = torch.float32,
        spare_frames: int = 0,
        policy: Policy | None = None,
        store: type[Store] = PlainStore,
    ) -> "MemoryPlan":
        """Plan for latents of `shape` [B, C, F, h, w], where F counts given and new frames.

        A window of -1 is full history. Keys default to raw where positions or the policy move them.
        """
        positions, policy = positions or Absolute(), policy or Window()
        batch, _, frames, height, width = shape
        evicts = 0 <= window_frames < frames
        if not evicts:  # no sink is needed
            window_frames, sink_frames = frames, 0
        return cls(
            layers=config.num_layers,
            heads=config.num_heads,
            head_dim=config.head_dim,
            batch=batch,
            height=height // PATCH[1],
            width=width // PATCH[2],
            window_frames=window_frames,
            sink_frames=sink_frames,
            keys=keys or ("raw" if positions.moving or policy.raw else "rotated"),
            positions=positions,
            dtype=dtype,
            spare_frames=spare_frames,
            policy=policy,
            store=store,
            evicts=evicts,
        )

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width

    @property
    def recent_frames(self) -> int:
        """Frames of the window after the sink: the recent past and the current chunk."""
        return self.window_frames - self.sink_frames

    @property
    def held_frames(self) -> int:
        """Frames that are allocated."""
        return self.window_frames + self.spare_frames

    @property
    def slots(self) -> Slots:
        """Layout of the store."""
        return Slots(
            self.layers, self.batch, self.held_frames, self.frame_tokens, self.heads, self.head_dim,
            self.dtype,
        )  # fmt: skip

    @property
    def static(self) -> bool:
        """Whether a pass does the same work for the same slots and positions."""
        return self.policy.static and self.store.static

    @property
    def layer_bytes(self) -> int:
        """Bytes of the keys (or values) of one layer."""
        tokens = self.batch * self.held_frames * self.frame_tokens
        return tokens * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def frequencies(self) -> tuple[float, ...] | None:
        """Temporal frequencies of RoPE that positions bring along; None: its own."""
        return self.positions.frequencies(self.head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: keys, values, rotated keys of a layer if raw, the policy's own."""
        means = self.layers * self.layer_bytes // self.frame_tokens if self.policy.means else 0
        rotated = self.layer_bytes if self.keys == "raw" else 0
        own = means + self.policy.count_bytes(self)
        return self.store.count_bytes(self.slots) + rotated + own

    def bytes_on(self, device: torch.device) -> tuple[int, int]:
        """Return the bytes on a device and those in host memory besides, 0 where it is the same."""
        host = self.store.count_host_bytes(self.slots)
        return (self.nbytes + host, 0) if device.type == "cpu" else (self.nbytes, host)

    @property
    def read_bytes(self) -> int:
        """Most bytes that a policy copies to read a layer."""
        return 2 * self.layer_bytes if self.policy.copies else 0

    def table(self, positions: Sequence[int], like: Tensor) -> Tensor:
        """Return the rotations of the tokens of whole frames at these temporal positions."""
        grid, frequencies = (self.height, self.width), self.frequencies
        return rotation_table(positions, *grid, self.head_dim, like=like, frequencies=frequencies)

    def rotate(self, raw_key_BTHD: Tensor, positions: Sequence[int]) -> Tensor:
        """Rotate whole frames of raw keys to these temporal positions, one for each frame."""
        return self.rope(raw_key_BTHD, self.table(positions, raw_key_BTHD))

    def check_chunk(self, frames: int) -> None:
        """Raise ValueError when the sink and a chunk of `frames` do not fit in the window."""
        if frames > self.recent_frames:
            raise ValueError(
                f"window of {self.window_frames} frames is smaller than sink {self.sink_frames} +"
                f" chunk {frames}: use a window of at least {self.sink_frames + frames}"
            )
