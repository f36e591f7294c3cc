"""The interface of memory policies, which choose what is read. `policies/` has one a file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..wan.causal import KeyValue, Seen
from .positions import Placement

if TYPE_CHECKING:
    from .plan import MemoryPlan


class Held(NamedTuple):
    """A committed frame."""

    order: int  # of arrival
    frame: int  # absolute latent index in the video


class Frames(Protocol):
    """The visible past and the current chunk, as a policy reads them.

    Shape suffixes as in `refiner.wan.causal`. In the first chunk `past` is empty. Between two
    chunks (`evicting`, `opening`) there is no chunk, and keys are as stored.
    """

    past: Sequence[Held]  # visible frames, oldest first
    chunk: int  # frames of this pass: a refine pass may take those of the chunk twice
    current: tuple[int, ...]  # absolute latent indices of the current chunk
    placement: Placement  # temporal positions of the past and of this pass
    places: Sequence[int]  # of the past and of this pass: index of each frame in `all`

    def means(self, layer: int) -> Tensor:
        """Mean key before RoPE of each past frame [B, F, H, D]."""
        ...

    def all(self, layer: int) -> KeyValue:
        """Everything visible and the chunk, without a copy where the memory allows it."""
        ...

    def take(self, layer: int, ranks_BF: Tensor) -> KeyValue:
        """Past frames by rank, for each sample, then the chunk; a copy.

        `ranks_BF` are int64 indices into `past`, on the query's device.
        """
        ...

    def new(self, layer: int) -> KeyValue:
        """The tokens of this pass, which follow the past in `all`, keys rotated."""
        ...

    def stored(self, layer: int, ranks: Sequence[int]) -> KeyValue:
        """Past frames by rank, the same for each sample, keys as stored; a copy."""
        ...

    def put(self, layer: int, ranks: Sequence[int], frames: KeyValue) -> None:
        """Replace past frames, keys as stored. Only between two chunks."""
        ...


def check_ranks(ranks_BF: object) -> None:
    """Raise ValueError unless ranks are an int64 tensor with a row for each sample."""
    if isinstance(ranks_BF, Tensor) and ranks_BF.ndim == 2 and ranks_BF.dtype == torch.long:
        return
    given = list(ranks_BF.shape) if isinstance(ranks_BF, Tensor) else type(ranks_BF).__name__
    raise ValueError(f"ranks {given}: take() wants an int64 tensor [batch, frames]")


class Policy:
    """Chooses what each head of a layer attends to.

    Subclasses are frozen dataclasses whose fields are their knobs. At its neutral value a policy
    returns `frames.all(layer)`, and the run equals that of the window bit for bit.

    A policy that remembers something from chunk to chunk returns an object for it from `start`:
    a `Policy`, too, which belongs to one memory.
    """

    name: ClassVar[str]  # as in POLICIES
    means: ClassVar[bool] = False  # whether it reads Frames.means, which the memory then stores
    copies: ClassVar[bool] = True  # whether a read may copy a layer, whose bytes are then counted
    # whether a read does the same work for the same slots and positions, on the device alone
    static: ClassVar[bool] = False
    raw: ClassVar[bool] = False  # whether it needs keys before RoPE, to move or average them
    # for users and presets that name none: window and sink, and positions
    window: ClassVar[tuple[int, int] | None] = None
    positions: ClassVar[str | None] = None

    def check(self, plan: "MemoryPlan") -> None:
        """Raise ValueError for a memory that the policy cannot work with."""

    def count_bytes(self, plan: "MemoryPlan") -> int:
        """Count the bytes of the tensors that it stores besides the memory's own."""
        return 0

    def scratch_bytes(self, plan: "MemoryPlan", queries: int) -> int:
        """Count what a read for so many tokens of a sample allocates besides copies of K/V."""
        return 0

    def start(self, plan: "MemoryPlan", device: torch.device | str) -> "Policy":
        """Return the policy for one empty memory: itself if it remembers nothing."""
        return self

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue | list[Seen]:
        """Return what the chunk's queries (given before RoPE) attend to, keys rotated."""
        raise NotImplementedError

    def evicting(self, frames: Frames) -> None:
        """Look at the frames in `frames.past` before they leave; each frame is shown once."""

    def opening(self, frames: Frames) -> None:
        """Look at the past of the next chunk, before its first pass; it may replace frames."""

    def flushed(self, keep_sink: bool) -> None:
        """Forget what came from frames that were dropped; the sink stays if `keep_sink`."""

    def check_means(self) -> None:
        """Raise ValueError unless the memory stores mean keys for this policy."""
        if not self.means:
            raise ValueError(f"policy {self.name} reads mean keys: set means = True in its class")
