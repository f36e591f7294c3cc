"""The five verbs of which every sampling method is made: predict, renoise, commit, fork/select, event."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .memory.frames import FrameLedger
from .noise.refiner import Refiner
from .noise.source import Draw, NoiseSource
from .schedule import Chunk, Level
from .wan.causal import CausalWan, KeyValue, View
from .wan.upload import upload


class Memory(Protocol):
    """Keys and values of the past (refiner/memory)."""

    ledger: FrameLedger

    def view(self, frames: Sequence[int], kept: Tensor | None = None) -> View: ...
    def commit(self) -> None: ...
    def flush(self, keep_last: int) -> None: ...
    def free(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PromptSwitch:
    """From the next pass on, another context [B, L, text_dim]; what is in memory stays as it was written."""

    context: Tensor


@dataclass(frozen=True, slots=True)
class Flush:
    """Forget all of the past but the sink and its last frames (Infinity-RoPE's KV flush)."""

    keep_last: int = 1


@dataclass(frozen=True, slots=True)
class Cut:
    """The next chunk's temporal positions jump away from its history (Infinity-RoPE's RoPE cut)."""

    position: int = 45


Event = PromptSwitch | Flush | Cut


@dataclass(frozen=True, slots=True)
class Progress:
    """What a callback is told after every prediction."""

    chunk: Chunk
    chunks: int  # in all, given ones included
    level: int  # index into chunk.levels
    x0: Tensor  # [B, C, F, h, w], the prediction


def predict_x0(x: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """x0 = x_t − σ v, in float64 where the device has it, returned in the dtype of x."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return (x.to(wide) - sigma * flow.to(wide)).to(x.dtype)


def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Ψ(x0, ε) = (1 − σ) x0 + σ ε (AutoRefiner eq. 4, with sigma = 1 as pure noise)."""
    return (1 - sigma) * x0 + sigma * noise


@dataclass(slots=True)
class Rollout:
    """A video in the making: the network, its prompt, its memory of the past and its noise path.

    Latents are [B, C, F, h, w], normalised, in `dtype`; the network runs in `network_dtype`.
    """

    network: CausalWan
    text: list[KeyValue]
    memory: Memory
    noise: NoiseSource
    chunks: Sequence[Chunk]
    frame_shape: tuple[int, int, int, int]  # [B, C, h, w]
    device: torch.device
    network_dtype: torch.dtype
    dtype: torch.dtype = torch.float32
    callback: Callable[[Progress], None] | None = None
    given: Sequence[tuple[Tensor, Chunk]] = ()  # clean latents [B, C, F, h, w] that the new chunks follow
    candidate: int = 0
    refiner: Refiner | None = None
    refiner_text: list[KeyValue] | None = None

    def draw(self, chunk: Chunk, level: Level, repeat: int = 0, x0: Tensor | None = None) -> Tensor:
        """Noise of the path for this chunk and level (the chunk's first level: the noise it starts from).

        It is the source's, plus the refiner's residual where the level is refined; `x0` is the prediction before it.
        """
        batch, channels, height, width = self.frame_shape
        draw = Draw(level.step, repeat, self.candidate)
        noise = self.noise(chunk, draw, (batch, channels, chunk.length, height, width))
        noise = upload(noise, self.device, self.dtype)
        if self.refiner is None or not self.refiner.at(level):
            return noise
        return noise + self.residual(noise, x0, level, chunk)

    def residual(self, noise: Tensor, x0: Tensor | None, level: Level, chunk: Chunk) -> Tensor:
        """What the refiner adds to a noise."""
        return self.refiner.residual(noise, x0, level, chunk, self.memory, self.refiner_text, self.network_dtype)

    @property
    def reads_pending(self) -> bool:
        """Whether the noise path reads the keys and values that a prediction left."""
        return self.refiner is not None and self.refiner.cache.previous == "pending"

    def predict(self, x: Tensor, level: Level, chunk: Chunk, kept: Tensor | None = None) -> Tensor:
        """x0 of the chunk at this level; its keys and values stand in memory as pending.

        Samples that are True in `kept` [B] keep the pending ones that they have; their x0 is then of no use.
        """
        flow = self._network(x, level.t, chunk, kept=kept)
        x0 = predict_x0(x, flow, level.sigma)
        if self.callback is not None:
            chunks = len(self.given) + len(self.chunks)
            self.callback(Progress(chunk, chunks, chunk.levels.index(level), x0.detach()))
        return x0

    def renoise(self, x0: Tensor, level: Level, chunk: Chunk, repeat: int = 0) -> Tensor:
        """x0 taken to `level` with fresh noise from the noise path."""
        return add_noise(x0, self.draw(chunk, level, repeat, x0), level.sigma)

    def commit(self, x0: Tensor, chunk: Chunk) -> None:
        """Make the chunk history: one pass over its clean latents at t = 0 that writes their keys and values.

        Not for the last chunk of the run: nothing would read it.
        """
        if chunk == self.chunks[-1]:
            return
        self._network(x0, 0.0, chunk, keys_only=True)
        self.memory.commit()

    def commit_pending(self) -> None:
        """Make the chunk history as the last prediction left it in memory, without a pass (diagonal forcing)."""
        self.memory.commit()

    def fork(self, n: int) -> "list[Rollout]":
        """`n` candidates that share this memory and draw their own noise; candidate 0 draws the run's own.

        Each prediction overwrites the chunk's place in memory, so commit the one that is chosen.
        """
        return [replace(self, candidate=self.candidate * n + i) for i in range(n)]

    def select(self, candidates: Sequence[Tensor], scores: Tensor) -> Tensor:
        """Of each sample the candidate with the highest score; `scores` is [candidates, B]."""
        if scores.shape != (len(candidates), self.frame_shape[0]):
            raise ValueError(
                f"scores have shape {tuple(scores.shape)}, expected [{len(candidates)} candidates,"
                f" {self.frame_shape[0]} samples]: score every candidate of every sample"
            )
        if not scores.isfinite().all():
            raise ValueError("a score is NaN or infinite, so candidates cannot be compared: check the reward's model")
        best = scores.argmax(0)
        return torch.stack(list(candidates))[best, torch.arange(len(best), device=best.device)]

    def event(self, event: Event) -> None:
        """Something that happens between two chunks: a prompt switch, a flush of the past, a cut."""
        match event:
            case PromptSwitch(context):
                context = context.to(self.device, self.network_dtype)
                self.text = self.network.text(context)
                self.refiner_text = self.refiner.text(context) if self.refiner else None
            case Flush(keep_last):
                self.memory.flush(keep_last)
            case Cut(position):
                self.memory.ledger.cut(position)

    def _network(
        self, x: Tensor, t: float, chunk: Chunk, keys_only: bool = False, kept: Tensor | None = None
    ) -> Tensor | None:
        timestep = torch.full((1, 1), t, dtype=torch.float64)
        view = self.memory.view(chunk.frames, kept)
        return self.network(x.to(self.network_dtype), timestep, self.text, view, keys_only=keys_only)


Sampler = Callable[[Rollout], Iterator[Tensor]]
