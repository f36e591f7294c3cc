"""The interface of memory policies, which choose what is read. `policies/` has one a file."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..wan.causal import KeyValue, Seen


class Held(NamedTuple):
    """A committed frame."""

    order: int  # of arrival
    frame: int  # absolute latent index in the video


class Frames(Protocol):
    """The visible past and the current chunk, as a policy reads them.

    Shape suffixes as in `refiner.wan.causal`. In the first chunk `past` is empty.
    """

    past: Sequence[Held]  # visible frames, oldest first
    chunk: int  # frames of the current chunk

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
    """

    name: ClassVar[str]  # as in POLICIES
    means: ClassVar[bool] = False  # whether it reads Frames.means, which the memory then stores
    copies: ClassVar[bool] = True  # whether a read may copy a layer, whose bytes are then counted

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue | list[Seen]:
        """Return what the chunk's queries (given before RoPE) attend to, keys rotated."""
        raise NotImplementedError

    def evicting(self, frames: Frames) -> None:
        """Look at the frames in `frames.past` before they leave; each frame is shown once."""

    def check_means(self) -> None:
        """Raise ValueError unless the memory stores mean keys for this policy."""
        if not self.means:
            raise ValueError(f"policy {self.name} reads mean keys: set means = True in its class")
