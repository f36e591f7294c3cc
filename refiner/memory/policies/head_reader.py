"""The state of head-windows in one memory: it chooses segments and reads by head."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...wan.causal import KeyValue, Seen
from ...wan.rope import rotate, rotation_table
from ..heads import HeadList
from ..policy import Frames, Held, Policy
from .pieces import gather, indices

if TYPE_CHECKING:
    from ..plan import MemoryPlan
    from .head_windows import HeadWindows

DECIDING_LAYER = 1  # its keys choose the segments of all layers


def most_segments(frame_tokens: int, most: int) -> int:
    """Return the largest number of equal segments of a frame, at most `most`."""
    return max(count for count in range(1, most + 1) if frame_tokens % count == 0)


def similarity(key_BTHD: Tensor, frames: Sequence[int], plan: "MemoryPlan") -> Tensor:
    """Return the cosine similarity of each token's key before RoPE to that in the next frame.

    The keys of these absolute `frames` are as stored; the result has one frame less.
    """
    size = plan.frame_tokens
    now, following = key_BTHD[:, :-size], key_BTHD[:, size:]
    if plan.keys == "rotated":  # to the next frame's position, which leaves the cosine as it was
        steps = [later - earlier for earlier, later in pairwise(frames)]
        table = rotation_table(steps, 1, 1, plan.head_dim, like=now, frequencies=plan.frequencies)
        now = rotate(now, table.repeat_interleave(size, dim=0))
    return F.cosine_similarity(now.flatten(2).float(), following.flatten(2).float(), dim=2)


class HeadReader(Policy):
    """Static heads read the near frames; dynamic ones also the segments that change most.

    The segments are a function of the committed past, so a layer that is recomputed in the backward
    pass reads the same ones.
    """

    name = "head-windows"

    def __init__(self, policy: "HeadWindows", plan: "MemoryPlan", device: torch.device) -> None:
        self.policy, self.plan = policy, plan
        self.listed = policy.listed or HeadList(plan.heads, ((),) * plan.layers)
        self.cut = most_segments(plan.frame_tokens, policy.segments)
        # heads of each layer, static ones first
        orders = [(*near, *self.listed.dynamic(i)) for i, near in enumerate(self.listed.static)]
        self.orders_LH = torch.tensor(orders, device=device)
        most = policy.share(plan, plan.window_frames)
        self.chosen_BK = torch.empty((plan.batch, most), dtype=torch.long, device=device)
        self.past: Sequence[Held] = ()  # whose segments are in `chosen_BK`

    def opening(self, frames: Frames) -> None:
        """See `refiner.memory.policy.Policy`."""
        self.past = ()

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue | list[Seen]:
        """See `refiner.memory.policy.Policy`."""
        whole, total = frames.all(layer), len(frames.places) * self.cut
        first, last = self.policy.sink, len(frames.past) - self.policy.recent
        static = self.listed.static[layer]
        share = self.policy.share(self.plan, max(0, last - first))
        reads_all = share == (last - first) * self.cut and not static
        if layer == 0 or last <= first or reads_all:
            return whole
        places_F = indices(list(frames.places), raw_query_BNHD.device)
        places_FS = places_F[:, None] * self.cut + torch.arange(self.cut, device=places_F.device)
        front, middle, back = (each.flatten() for each in places_FS.tensor_split((first, last)))
        near_P = torch.cat((front, back))
        chosen_BK = middle[self.choose(frames, first, last, share)]
        front, back = (each.expand(len(chosen_BK), -1) for each in (front, back))
        far_BP = torch.cat((front, chosen_BK, back), dim=1)
        order_H, count = self.orders_LH[layer], len(static)
        parts = {
            True: gather(whole, near_P.expand(len(chosen_BK), 1, -1), total, order_H[:count]),
            False: gather(whole, far_BP[:, None], total, order_H[count:]),
        }
        return [
            Seen(run.heads, *(part[:, :, run.order] for part in parts[run.static]))
            for run in self.listed.runs(layer)
        ]

    def choose(self, frames: Frames, first: int, last: int, share: int) -> Tensor:
        """Return the segments [B, share] between two ranks that change most, once a chunk."""
        if self.past != frames.past:
            ranks = range(first, last + 1)
            key = frames.stored(DECIDING_LAYER, ranks).key.detach()
            numbers = [frames.past[rank].frame for rank in ranks]
            alike_BT = similarity(key, numbers, self.plan)
            alike_BS = alike_BT.unflatten(1, ((last - first) * self.cut, -1)).mean(dim=2)
            # not in place: a view of an earlier chunk may read its own once more
            self.chosen_BK = torch.zeros_like(self.chosen_BK)
            best_BK = alike_BS.topk(share, dim=1, largest=False).indices
            self.chosen_BK[:, :share] = best_BK.sort(dim=1).values
            self.past = frames.past
        return self.chosen_BK[:, :share]
