"""Measure how near each head of a model looks, and list those that look near alone (Forcing-KV)."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from .estimate import available_bytes
from .files import partial_path
from .generate import load_network, make_context
from .job import Job, estimate_memory, prepare
from .memory.heads import HeadList
from .memory.plan import MemoryPlan
from .memory.policy import Frames, Policy
from .request import GenerateOptions
from .sample import sample
from .wan.causal import KeyValue

NEAR, SKIPPED = 4, 1  # last frames that count as near, first ones that are left out
ROWS = 1024  # query tokens at once


class Attention(Policy):
    """Read everything; add up the attention of a chunk to near frames, and to all but the first."""

    name: ClassVar[str] = "attention"
    copies: ClassVar[bool] = False

    def __init__(self, layers: int, heads: int, chunk: int) -> None:
        """Measure in the chunk that begins at the latent frame `chunk`."""
        self.chunk = chunk
        self.near_LH, self.all_LH = torch.zeros(2, layers, heads, dtype=torch.float64)

    def start(self, plan: MemoryPlan, device: torch.device | str) -> "Attention":
        """See `refiner.memory.policy.Policy`."""
        self.plan = plan
        return self

    def scratch_bytes(self, plan: MemoryPlan, queries: int) -> int:
        """See `refiner.memory.policy.Policy`: scores and their softmax of one head in fp32."""
        return 8 * plan.batch * min(ROWS, queries) * plan.held_frames * plan.frame_tokens

    def read(self, layer: int, raw_query_BNHD: Tensor, frames: Frames) -> KeyValue:
        """See `refiner.memory.policy.Policy`."""
        seen = frames.all(layer)
        if frames.current[0] == self.chunk:
            query_BNHD = self.plan.rotate(raw_query_BNHD, frames.placement.chunk)
            for head in range(query_BNHD.shape[2]):
                by_place = attention_by_frame(
                    query_BNHD[:, :, head], seen.key[:, :, head], len(frames.places)
                )
                by_frame = by_place[list(frames.places)]
                self.near_LH[layer, head] += by_frame[-NEAR:].sum()
                self.all_LH[layer, head] += by_frame[SKIPPED:].sum()
        return seen


def attention_by_frame(query_BND: Tensor, key_BTD: Tensor, frames: int) -> Tensor:
    """Return how much attention the queries of a head give to each frame, in all [F]."""
    total = torch.zeros(frames, dtype=torch.float64)
    for rows_BRD in query_BND.split(ROWS, dim=1):
        scores = rows_BRD.float() @ key_BTD.float().transpose(1, 2) / query_BND.shape[-1] ** 0.5
        by_frame = scores.softmax(dim=2).unflatten(2, (frames, -1)).sum(dim=(0, 1, 3))
        total += by_frame.cpu()
    return total


@dataclass(frozen=True, slots=True)
class Calibration:
    """The share of near frames in the attention of each head, by layer."""

    near: tuple[tuple[float, ...], ...]
    threshold: float

    @property
    def heads(self) -> HeadList:
        """The heads whose share reaches the threshold."""
        static = (
            tuple(head for head, share in enumerate(layer) if share >= self.threshold)
            for layer in self.near
        )
        return HeadList(len(self.near[0]), tuple(static))

    def table(self) -> str:
        """Describe each layer in a line; static heads have a star."""
        heads = self.heads
        lines = [f"layer  static  share of the last {NEAR} frames, by head"]
        for layer, shares in enumerate(self.near):
            static = heads.static[layer]
            cells = (f"{share:.2f}{'*' * (head in static)}" for head, share in enumerate(shares))
            lines.append(f"{layer:5}  {len(static):6}  {' '.join(f'{cell:<5}' for cell in cells)}")
        count = sum(map(len, heads.static))
        lines.append(f"{count} of {heads.num_heads * len(self.near)} heads are static")
        return "\n".join(line.rstrip() for line in lines)

    def write(self, path: Path, source: dict[str, object]) -> None:
        """Write the list of heads as JSON, with where it comes from; Forcing-KV reads it, too."""
        heads = self.heads
        content = {
            "format": "forcingkv_offline",
            **source,
            "measure": f"attention to the last {NEAR} frames / to all after the first {SKIPPED}",
            "threshold": self.threshold,
            "num_layers": len(self.near),
            "num_heads": heads.num_heads,
            "layers": [
                {
                    "layer_idx": layer,
                    "static_head": heads.static[layer],
                    "dynamic_head": heads.dynamic(layer),
                    "near": [round(share, 4) for share in shares],
                }
                for layer, shares in enumerate(self.near)
            ],
        }
        temporary = partial_path(path)
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def prepare_calibration(options: GenerateOptions, threshold: float) -> Job:
    """Plan a clip that holds all of its past and measures attention, without loading weights.

    Raises ValueError for a clip without far frames, or one that does not fit in memory.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold}: give a share of attention, above 0 and up to 1")
    shortest = 1 + 4 * (NEAR + SKIPPED)
    if options.frames < shortest:
        raise ValueError(
            f"a clip of {options.frames} frames has none that lie far back: give at least"
            f" {shortest}"
        )
    job = prepare(replace(options, window=-1, sink=0, dry_run=True))
    sizes = job.config.num_layers, job.config.num_heads
    plan = replace(job.plan, policy=Attention(*sizes, job.plan.chunks[-1].start))
    estimate = estimate_memory(
        options, job.files, job.config, plan, job.method, job.dtype, None, None, job.device
    )
    estimate.check(available_bytes(job.device))
    return replace(job, plan=plan, estimate=estimate)


def calibrate(job: Job, prompts: Sequence[str], threshold: float) -> Iterator[Calibration]:
    """Sample each prompt; yield the shares measured so far after each.

    Attention is measured in every level of the last chunk.
    """
    asked = [replace(job, options=replace(job.options, prompt=prompt)) for prompt in prompts]
    contexts = [make_context(each) for each in asked]
    network, attention = load_network(job), job.plan.policy
    for context in contexts:
        with torch.no_grad():
            for _ in sample(network, context, job.plan, seed=job.options.seed):
                pass
        near = (attention.near_LH / attention.all_LH).tolist()
        yield Calibration(tuple(map(tuple, near)), threshold)
