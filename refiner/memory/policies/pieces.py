"""Pieces of frames and masks, for policies that choose by head or by token."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...wan.causal import KeyValue, Seen
from ...wan.upload import upload
from ..policy import Frames

if TYPE_CHECKING:
    from ..plan import MemoryPlan


def indices(values: list[int], device: torch.device) -> Tensor:
    """Return an index tensor without waiting for the device."""
    return upload(torch.tensor(values, dtype=torch.long), device, torch.long)


def around(chosen: Tensor, first: int, last: int, count: int) -> Tensor:
    """Return the chosen ranks [..., k] between the `first` ones and those from `last` on."""
    ranks = torch.arange(count, device=chosen.device).expand(*chosen.shape[:-1], -1)
    return torch.cat((ranks[..., :first], chosen, ranks[..., last:]), dim=-1)


def gather(
    layer: KeyValue, index_BHP: Tensor, pieces: int, heads_H: Tensor | None = None
) -> KeyValue:
    """Copy pieces of a layer that is cut into `pieces` equal ones, as [B, P·size, H, D].

    `heads_H` are the heads that `index_BHP` chooses for, or that share its only row; None: all.
    """
    samples_B = torch.arange(len(index_BHP), device=index_BHP.device)
    if heads_H is None:
        heads_H = torch.arange(index_BHP.shape[1], device=index_BHP.device)
    cut = (part.unflatten(1, (pieces, -1)) for part in layer)
    chosen = (part[samples_B[:, None, None], index_BHP, :, heads_H[:, None]] for part in cut)
    return KeyValue(*(part_BHPSD.flatten(2, 3).transpose(1, 2) for part_BHPSD in chosen))


def take_by_head(frames: Frames, layer: int, ranks_BHF: Tensor) -> KeyValue:
    """Copy past frames by rank, for each sample and head, then the frames of the pass."""
    total = len(frames.places)
    ranks_BHF = around(ranks_BHF, 0, len(frames.past), total)
    places_F = indices(list(frames.places), ranks_BHF.device)
    return gather(frames.all(layer), places_F[ranks_BHF], total)


def mask_bytes(plan: "MemoryPlan", queries: int) -> int:
    """Count the bytes of a mask of one head for all that the memory holds."""
    return plan.batch * queries * plan.held_frames * plan.frame_tokens * plan.dtype.itemsize


def routed(
    layer: int, raw_query_BNHD: Tensor, frames: Frames, keys_BFHD: Tensor, first: int, k: int
) -> Iterator[Seen]:
    """Yield each head with a mask by which every query token sees its own k of some frames.

    `keys_BFHD` are the mean keys of those frames, which follow the `first` ones; every token sees
    all others.
    """
    whole, total = frames.all(layer), len(frames.places)
    batch, tokens, heads, _ = raw_query_BNHD.shape
    # the rank of each frame in the order of `whole`
    ranks_F = indices(sorted(range(total), key=frames.places.__getitem__), raw_query_BNHD.device)
    for head in range(heads):
        query_BND = raw_query_BNHD[:, :, head].float()
        scores_BNF = torch.einsum("bnd,bfd->bnf", query_BND, keys_BFHD[:, :, head])
        mask_BNF = raw_query_BNHD.new_zeros(batch, tokens, total)
        mask_BNF[..., first : first + keys_BFHD.shape[1]] = torch.finfo(mask_BNF.dtype).min
        mask_BNF.scatter_(2, scores_BNF.topk(k, dim=2).indices + first, 0)
        mask_BNT = mask_BNF[..., ranks_F].repeat_interleave(whole.key.shape[1] // total, dim=2)
        here = slice(head, head + 1)
        yield Seen(here, whole.key[:, :, here], whole.value[:, :, here], mask_BNT[:, None])
