"""Retrieval (CAMR): sink, last frames, and the k others that answer the mean query best."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...wan.causal import KeyValue
from ..policy import Frames, Policy


@dataclass(frozen=True, slots=True)
class TopFrames(Policy):
    """Attend to `sink` first, `recent` last and the best `k` frames between them.

    A frame is scored by its mean key before RoPE, so its distance does not matter. With k as large
    as the history, nothing is left out and the run is that of the window, bit for bit.
    """

    name: ClassVar[str] = "top-frames"
    means: ClassVar[bool] = True

    k: int = 4
    sink: int = 1
    recent: int = 3

    def __post_init__(self) -> None:
        if self.k < 1 or self.sink < 0 or self.recent < 0:
            raise ValueError(
                f"top-frames with k {self.k}, sink {self.sink}, recent {self.recent}: give a k of"
                " at least 1, the others 0 or more"
            )

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        """See `refiner.memory.policy.Policy`."""
        count = len(frames.past)
        last = count - self.recent
        if last - self.sink <= self.k:
            return frames.all(layer)
        middle_BFHD = frames.means(layer)[:, self.sink : last].float()
        query_BHD = raw_query_BNHD.mean(dim=1).float()
        scores_BF = torch.einsum("bfhd,bhd->bf", middle_BFHD, query_BHD)
        best_BF = scores_BF.topk(self.k, dim=1).indices.sort(dim=1).values + self.sink
        ranks_BF = torch.arange(count, device=best_BF.device).expand(len(best_BF), -1)
        return frames.take(
            layer, torch.cat((ranks_BF[:, : self.sink], best_BF, ranks_BF[:, last:]), dim=1)
        )
