"""Tokens that stay when their frames leave: newer ones compete with those chosen before."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...wan.causal import KeyValue
from ...wan.rope import rotate, span
from ..policy import Frames, Policy

if TYPE_CHECKING:
    from ..plan import MemoryPlan
    from .deep_sink import DeepSink


class Top(NamedTuple):
    """Chosen tokens of a layer, oldest first, detached; always as many."""

    raw_key: Tensor  # [B, T, H, D]
    value: Tensor  # [B, T, H, D]
    place: Tensor  # [B, T], index of each token in its frame
    newest: int  # absolute latent index of the last frame that competed
    chunk: tuple[int, ...]  # absolute latent indices of the chunk that chose


class TopTokens(Policy):
    """The chosen tokens of one memory, by layer, and how `DeepSink` reads them.

    A token is scored by the sum of its products with all queries of the chunk, in all heads, before
    RoPE, so its distance does not matter. What was not chosen does not compete again.
    """

    name = "deep-sink"

    def __init__(self, knobs: "DeepSink", plan: "MemoryPlan") -> None:
        self.knobs, self.plan = knobs, plan
        self.frames = knobs.budget - knobs.sink - knobs.recent  # that the tokens are worth
        self.latest: dict[int, Top] = {}
        # what a pass with autograd read, for its recomputation in the backward pass
        self.recorded: dict[tuple[int, tuple[int, ...]], Top] = {}

    @staticmethod
    def count_bytes(plan: "MemoryPlan", frames: int) -> int:
        """Count the bytes of tokens worth this many frames, in all layers."""
        tokens = plan.layers * plan.batch * frames * plan.frame_tokens
        key_bytes = plan.heads * plan.head_dim * plan.dtype.itemsize
        return tokens * (2 * key_bytes + torch.long.itemsize)

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        """See `refiner.memory.policy.Policy`."""
        count, sink = len(frames.past), self.knobs.sink
        if count <= self.knobs.budget:
            return frames.all(layer)
        last = count - self.knobs.recent
        top = self._top(layer, raw_query_BNHD, frames, range(sink, last))
        ends = frames.stored(layer, [*range(sink), *range(last, count)])
        cut, new = sink * self.plan.frame_tokens, frames.new(layer)
        raw_key, value = (
            torch.cat((end[:, :cut], part, end[:, cut:]), dim=1)
            for end, part in zip(ends, top, strict=False)
        )
        key = self._rotated(raw_key, top.place, frames)
        return KeyValue(torch.cat((key, new.key), dim=1), torch.cat((value, new.value), dim=1))

    def flushed(self, keep_sink: bool) -> None:
        """See `refiner.memory.policy.Policy`."""
        self.latest.clear()

    def _top(self, layer: int, raw_query_BNHD: Tensor, frames: Frames, middle: range) -> Top:
        """Return what the chunk chose at its first read."""
        chunk, training = frames.current, torch.is_grad_enabled()
        top = self.recorded.get((layer, chunk)) if training else None
        top = top or self.latest.get(layer)
        if top is None or top.chunk != chunk:
            top = self.latest[layer] = self._choose(layer, raw_query_BNHD, frames, middle)
        if training:
            self.recorded[layer, chunk] = top
        return top

    @torch.no_grad()
    def _choose(self, layer: int, raw_query_BNHD: Tensor, frames: Frames, middle: range) -> Top:
        """Choose among the tokens chosen before and those of frames that have not competed."""
        before, size = self.latest.get(layer), self.plan.frame_tokens
        newest = before.newest if before else -1
        ranks = [rank for rank in middle if frames.past[rank].frame > newest]
        key, value = frames.stored(layer, ranks)
        place = torch.arange(size, device=key.device).repeat(len(key), len(ranks))
        tokens = (key, value, place)
        if before:
            tokens = [torch.cat(pair, dim=1) for pair in zip(before, tokens, strict=False)]
        query_BHD = raw_query_BNHD.float().sum(dim=1)
        scores_BT = torch.einsum("bthd,bhd->bt", tokens[0].float(), query_BHD)
        best_BT = scores_BT.topk(self.frames * size, dim=1).indices.sort(dim=1).values
        samples = torch.arange(len(key), device=key.device)[:, None]
        chosen = (part[samples, best_BT] for part in tokens)
        return Top(*chosen, frames.past[middle[-1]].frame, frames.current)

    def _rotated(self, raw_key_BTHD: Tensor, place_BT: Tensor, frames: Frames) -> Tensor:
        """Rotate sink and top to right before the recent frames; tokens keep their places."""
        sink, size, past = self.knobs.sink, self.plan.frame_tokens, frames.placement.past
        recent = past[len(past) - self.knobs.recent :]
        before = sink + self.frames
        start = (*recent, *frames.placement.chunk)[0] - before
        table = self.plan.table((*span(start, before), *recent), like=raw_key_BTHD)
        rows_BT = torch.arange(len(table), device=table.device).repeat(len(place_BT), 1)
        top_BT = rows_BT[:, sink * size : before * size]
        top_BT += place_BT - top_BT % size
        rotated = rotate(raw_key_BTHD.flatten(0, 1), table[rows_BT].flatten(0, 1))
        return rotated.unflatten(0, rows_BT.shape)
