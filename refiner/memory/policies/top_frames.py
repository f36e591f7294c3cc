"""Retrieval: sink, last frames, and the k others whose mean keys answer the queries best."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...wan.causal import KeyValue, Seen
from ..policy import Frames, Policy
from .pieces import around, mask_bytes, routed, take_by_head

if TYPE_CHECKING:
    from ..plan import MemoryPlan


@dataclass(frozen=True, slots=True)
class TopFrames(Policy):
    """Attend to `sink` first, `recent` last and the best `k` frames between them.

    Frames are scored by their mean keys before RoPE, so distance does not matter. By granularity,
    the mean query of the `chunk` chooses (CAMR of CausalCine), that of each `head`, or each query
    `token` in each head (Resampling Forcing; a mask, which saves nothing). With k as large as the
    history, the run is that of the window, bit for bit.
    """

    name: ClassVar[str] = "top-frames"
    means: ClassVar[bool] = True

    k: int = 4
    sink: int = 1
    recent: int = 3
    granularity: str = "chunk"

    def __post_init__(self) -> None:
        known = self.granularity in ("chunk", "head", "token")
        if not known or self.k < 1 or self.sink < 0 or self.recent < 0:
            raise ValueError(
                f"top-frames with k {self.k}, sink {self.sink}, recent {self.recent}, granularity"
                f" {self.granularity}: give a k of at least 1, a sink and recent frames of 0 or"
                " more, and chunk, head or token"
            )

    def scratch_bytes(self, plan: "MemoryPlan", queries: int) -> int:
        return mask_bytes(plan, queries) if self.granularity == "token" else 0

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue | Iterator[Seen]:
        last = len(frames.past) - self.recent
        if last - self.sink <= self.k:
            return frames.all(layer)
        middle_BFHD = frames.means(layer)[:, self.sink : last].float()
        if self.granularity == "token":
            return routed(layer, raw_query_BNHD, frames, middle_BFHD, self.sink, self.k)
        by_head = self.granularity == "head"
        formula = "bfhd,bhd->bhf" if by_head else "bfhd,bhd->bf"
        scores = torch.einsum(formula, middle_BFHD, raw_query_BNHD.mean(dim=1).float())
        best = scores.topk(self.k, dim=-1).indices.sort(dim=-1).values + self.sink
        ranks = around(best, self.sink, last, len(frames.past))
        return take_by_head(frames, layer, ranks) if by_head else frames.take(layer, ranks)
