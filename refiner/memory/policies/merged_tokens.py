"""The state of `Merge` in one memory: it chooses the tokens to merge, and reads them."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...wan.causal import KeyValue, Seen
from ..policy import Frames, Policy

if TYPE_CHECKING:
    from ..plan import MemoryPlan

# Finite: kernels that take keys in pieces get NaN where a whole piece is -inf.
HIDDEN = -1e4


class Choice(NamedTuple):
    """The merges of a chunk in a layer: tensors [B, F, S] for all frames of the window."""

    chunk: tuple[int, ...]  # absolute latent indices
    remaining: int  # most tokens that remain in a sample
    match: Tensor  # index in the frame before of the token that is taken over
    weight: Tensor  # of its value in the mean; 0 where none is taken over
    bias: Tensor  # log of the count of tokens; HIDDEN for those that were taken over


class MergedTokens(Policy):
    """The choices of one memory, by layer: each is made at a chunk's first read.

    Tokens that match the same one share its count. The samples of a batch keep as many tokens as
    the sample that keeps most, and hide what that is too many; to know how many costs one host
    synchronisation a layer and chunk.
    """

    name = "merge"

    def __init__(self, threshold: float, plan: "MemoryPlan") -> None:
        self.threshold, self.plan = threshold, plan
        self.choices: dict[int, Choice] = {}

    @staticmethod
    def count_bytes(plan: "MemoryPlan") -> int:
        """Count the bytes of a choice for every layer."""
        tokens = plan.layers * plan.batch * plan.window_frames * plan.frame_tokens
        return tokens * (torch.long.itemsize + 2 * torch.float32.itemsize)

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue | list[Seen]:
        """See `refiner.memory.policy.Policy`."""
        count = len(frames.past)
        if self.threshold > 1 or count < 2:
            return frames.all(layer)
        ranks_BF = torch.arange(count, device=raw_query_BNHD.device)
        whole = frames.take(layer, ranks_BF.expand(len(raw_query_BNHD), -1))
        past = count * self.plan.frame_tokens
        choice = self.choices.get(layer)
        if choice is None or choice.chunk != frames.current:
            choice = self._choose(whole.key[:, :past], frames.current)
            self.choices[layer] = choice
        bias_BT = choice.bias.flatten(1)[:, :past]
        order_BT = (bias_BT < 0).byte().argsort(dim=1, stable=True)[:, : choice.remaining]
        samples = torch.arange(len(order_BT), device=order_BT.device)[:, None]
        means = self._means(whole.value[:, :past], choice)
        key, value = (
            torch.cat((part[samples, order_BT], new[:, past:]), dim=1)
            for part, new in zip((whole.key, means), whole, strict=True)
        )
        bias_BT = F.pad(bias_BT.gather(1, order_BT), (0, whole.key.shape[1] - past))
        return [Seen(slice(None), key, value, bias_BT[:, None, None].to(raw_query_BNHD.dtype))]

    def flushed(self, keep_sink: bool) -> None:
        """See `refiner.memory.policy.Policy`."""
        self.choices.clear()

    @torch.no_grad()
    def _choose(self, key_BTHD: Tensor, chunk: tuple[int, ...]) -> Choice:
        shape = len(key_BTHD), self.plan.window_frames, self.plan.frame_tokens
        like = dict(device=key_BTHD.device)
        match, weight = torch.zeros(shape, dtype=torch.long, **like), torch.zeros(shape, **like)
        counts, taken = torch.ones(shape, **like), torch.zeros(shape, dtype=torch.bool, **like)
        by_frame = key_BTHD.flatten(2).unflatten(1, (-1, shape[2])).unbind(1)
        before = F.normalize(by_frame[0].float(), dim=-1)
        for frame, key_BSC in enumerate(by_frame[1:], start=1):
            key = F.normalize(key_BSC.float(), dim=-1)
            cosine, match[:, frame] = (key @ before.mT).max(dim=-1)
            merges = (cosine >= self.threshold).float()
            takers = torch.zeros_like(merges).scatter_add_(1, match[:, frame], merges)
            shares = counts[:, frame - 1] / takers.clamp(min=1)
            share = shares.gather(1, match[:, frame]) * merges
            counts[:, frame] += share
            weight[:, frame] = share / counts[:, frame]
            taken[:, frame - 1] = takers > 0
            before = key
        remaining = (~taken[:, : len(by_frame)]).flatten(1).sum(dim=1)
        bias = counts.log().masked_fill(taken, HIDDEN)
        return Choice(chunk, int(remaining.max()), match, weight, bias)

    def _means(self, value_BTHD: Tensor, choice: Choice) -> Tensor:
        """Return the mean value of each token and those before it that it takes over."""
        wide = torch.promote_types(value_BTHD.dtype, torch.float32)
        samples = torch.arange(len(value_BTHD), device=value_BTHD.device)[:, None]
        means: list[Tensor] = []
        before = None
        by_frame = value_BTHD.unflatten(1, (-1, self.plan.frame_tokens)).unbind(1)
        for frame, value_BSHD in enumerate(by_frame):
            mean = value_BSHD.to(wide)
            if before is not None:
                weight_BSHD = choice.weight[:, frame, :, None, None].to(wide)
                mean = torch.lerp(mean, before[samples, choice.match[:, frame]], weight_BSHD)
            means.append(mean.to(value_BTHD.dtype))
            before = mean
        return torch.cat(means, dim=1)
