"""The five verbs of which every sampling method is made: predict, renoise, commit, fork/select,
event."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from .memory.frames import FrameLedger
from .memory.plan import MemoryPlan
from .memory.positions import Cut
from .memory.ring import RingMemory
from .noise.refiner import Refiner
from .noise.source import Draw, NoiseSource
from .run_plan import RunPlan
from .schedule import Chunk, Level
from .timeline import Event, Flush, PromptSwitch, Timeline
from .wan.causal import CausalWan, KeyValue, View
from .wan.upload import upload

__all__ = [
    "Cut",
    "Flush",
    "Progress",
    "PromptSwitch",
    "Rollout",
    "Sampler",
    "add_noise",
    "predict_x0",
]


class Memory(Protocol):
    """Keys and values of the past (refiner/memory)."""

    plan: MemoryPlan
    ledger: FrameLedger

    def view(self, frames: Sequence[int], keep_pending: Tensor | None = None) -> View: ...
    def commit(self) -> None: ...
    def flush(self, keep_last: int, keep_sink: bool = True) -> None: ...
    def free(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """A prediction, as a callback receives it."""

    chunk: Chunk
    chunks: int | None  # in all, given ones included; None where the end is not known
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
    Iterate over a rollout for its chunks: a timeline's events happen before the chunk that they
    precede.
    """

    network: CausalWan
    text: list[KeyValue]
    memory: Memory
    noise: NoiseSource
    chunks: Iterable[Chunk]  # new ones; may be an iterator without a known end
    frame_shape: tuple[int, int, int, int]  # [B, C, h, w]
    device: torch.device
    network_dtype: torch.dtype
    dtype: torch.dtype = torch.float32
    callback: Callable[[Progress], None] | None = None
    given: Sequence[
        tuple[Tensor, Chunk]
    ] = ()  # clean latents [B, C, F, h, w] that the new chunks follow
    candidate: int = 0
    refiner: Refiner | None = None
    refiner_text: list[KeyValue] | None = None
    timeline: Timeline[Tensor] | None = None
    caches: Mapping[Hashable, Memory] = field(
        default_factory=dict
    )  # more memories than `memory`, by name
    last: Chunk | None = None  # known once the iteration has reached it: it is not committed
    before: Chunk | None = None  # the chunk that was entered last
    recent: deque[tuple[Tensor, Chunk]] = field(
        default_factory=deque
    )  # committed x0s that a recache may need

    @classmethod
    def of(
        cls,
        network: CausalWan,
        context: Tensor | Timeline[Tensor],
        plan: RunPlan,
        noise: NoiseSource,
        *,
        memory: Callable[[MemoryPlan, torch.device], Memory] = RingMemory,
        caches: Iterable[Hashable] = (),
        refiner: Refiner | None = None,
        initial: Tensor | None = None,
        callback: Callable[[Progress], None] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Rollout":
        """Make a rollout of a plan.

        `context` is [1 or B, L, text_dim]; `initial` holds the plan's given clean latents. Device
        and dtype of a pass are those of the weights, unless a host that keeps them elsewhere says
        where and in what it computes.
        """
        parameter = next(network.model.parameters())
        device, dtype = device or parameter.device, dtype or parameter.dtype
        timeline = context if isinstance(context, Timeline) else Timeline.of(context)
        first = timeline.scenes[0].prompt.to(device, dtype)
        memory_plan = plan.memory(network.config, dtype, refined=refiner is not None)
        return cls(
            network=network,
            text=network.text(first, plan.batch),
            memory=memory(memory_plan, device),
            noise=noise,
            chunks=plan.chunks,
            frame_shape=(plan.batch, network.config.in_dim, plan.height, plan.width),
            device=device,
            network_dtype=dtype,
            callback=callback,
            given=[
                (
                    initial[:, :, chunk.start : chunk.start + chunk.length].to(
                        device, torch.float32
                    ),
                    chunk,
                )
                for chunk in plan.given_chunks
            ],
            refiner=refiner,
            refiner_text=refiner.text(first, plan.batch) if refiner else None,
            timeline=timeline,
            caches={name: memory(memory_plan, device) for name in caches},
        )

    def __iter__(self) -> Iterator[Chunk]:
        """The new chunks; what the timeline says happens before each."""
        chunks = iter(self.chunks)
        chunk = next(chunks, None)
        while chunk is not None:
            following = next(chunks, None)
            self.last = chunk if following is None else None
            self.enter(chunk)
            yield chunk
            chunk = following

    def enter(self, chunk: Chunk) -> None:
        """Let happen what the timeline says before this chunk."""
        events = self.timeline.events(chunk, self.before) if self.timeline else ()
        for event in events:
            self.event(event)
        self.before = chunk

    def commit_given(self) -> None:
        """Make the given latents history, in every cache."""
        for latents, chunk in self.given:
            self.enter(chunk)
            for name in (None, *self.caches):
                self.commit(latents, chunk, cache=name)

    def cache(self, name: Hashable = None) -> Memory:
        """A memory by its name; None is the one that there always is."""
        return self.memory if name is None else self.caches[name]

    def draw(
        self,
        chunk: Chunk,
        level: Level,
        repeat: int = 0,
        x0: Tensor | None = None,
        cache: Hashable = None,
    ) -> Tensor:
        """Noise of the path for this chunk and level (the chunk's first level: the noise it starts
        from).

        It is the source's, plus the refiner's residual where the level is refined; `x0` is the
        prediction before it.
        """
        batch, channels, height, width = self.frame_shape
        draw = Draw(level.step, repeat, self.candidate)
        noise = self.noise(chunk, draw, (batch, channels, chunk.length, height, width))
        noise = upload(noise, self.device, self.dtype)
        if self.refiner is None or not self.refiner.at(level):
            return noise
        return noise + self.residual(noise, x0, level, chunk, cache)

    def residual(
        self, noise: Tensor, x0: Tensor | None, level: Level, chunk: Chunk, cache: Hashable = None
    ) -> Tensor:
        """What the refiner adds to a noise."""
        memory, text = self.cache(cache), self.refiner_text
        return self.refiner.residual(noise, x0, level, chunk, memory, text, self.network_dtype)

    @property
    def reads_pending(self) -> bool:
        """Whether the noise path reads the keys and values that a prediction left."""
        return self.refiner is not None and self.refiner.cache.previous == "pending"

    def predict(
        self,
        x: Tensor,
        level: Level,
        chunk: Chunk,
        keep_pending: Tensor | None = None,
        cache: Hashable = None,
    ) -> Tensor:
        """x0 of the chunk at this level; its keys and values stand in memory as pending.

        Where keep_pending[b], the cached K/V of sample b are left untouched; ignore its x0.
        """
        flow = self._network(x, level.t, chunk, keep_pending=keep_pending, cache=cache)
        x0 = predict_x0(x, flow, level.sigma)
        self._report(x0, level, chunk)
        return x0

    def predict_together(
        self, parts: Sequence[tuple[Tensor, Level, Chunk]], cache: Hashable = None
    ) -> list[Tensor]:
        """x0s of neighbouring chunks in one pass, each at its own level; they attend to each other.

        The window must have room for all of them.
        """
        frames = tuple(frame for _, _, chunk in parts for frame in chunk.frames)
        times = [level.t for _, level, chunk in parts for _ in chunk.frames]
        x = torch.cat([x for x, _, _ in parts], dim=2).to(self.network_dtype)
        view = self.cache(cache).view(frames)
        flow = self.network(x, torch.tensor([times], dtype=torch.float64), self.text, view)
        flows = flow.split([chunk.length for _, _, chunk in parts], dim=2)
        results = []
        for (x, level, chunk), flow in zip(parts, flows, strict=True):
            results.append(predict_x0(x, flow, level.sigma))
            self._report(results[-1], level, chunk)
        return results

    def renoise(
        self, x0: Tensor, level: Level, chunk: Chunk, repeat: int = 0, cache: Hashable = None
    ) -> Tensor:
        """x0 taken to `level` with fresh noise from the noise path.

        `repeat` 0 is the level's first draw; count further draws of it from 1.
        """
        return add_noise(x0, self.draw(chunk, level, repeat, x0, cache), level.sigma)

    def commit(self, x: Tensor, chunk: Chunk, t: float = 0.0, cache: Hashable = None) -> None:
        """Make the chunk history: one pass over its latents at timestep t that writes their keys
        and values.

        Not for the last chunk of the run: nothing would read it.
        """
        if chunk == self.last:
            return
        self._network(x, t, chunk, keys_only=True, cache=cache)
        self.cache(cache).commit()
        if cache is None and self.timeline is not None and self.timeline.recached:
            self._remember(x, chunk)

    def commit_pending(self) -> None:
        """Make the chunk history as the last prediction left it in memory, without a pass (diagonal
        forcing)."""
        self.memory.commit()

    def fork(self, n: int) -> "list[Rollout]":
        """`n` candidates that share this memory and draw their own noise; candidate 0 draws the
        run's own.

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
            raise ValueError(
                "a score is NaN or infinite, so candidates cannot be compared: check the reward's model"
            )
        best = scores.argmax(0)
        return torch.stack(list(candidates))[best, torch.arange(len(best), device=best.device)]

    def event(self, event: Event) -> None:
        """Something that happens between two chunks: a prompt switch, a flush of the past, a
        cut."""
        memories = (self.memory, *self.caches.values())
        match event:
            case PromptSwitch(context, recache):
                context, batch = context.to(self.device, self.network_dtype), self.frame_shape[0]
                self.text = self.network.text(context, batch)
                self.refiner_text = self.refiner.text(context, batch) if self.refiner else None
                if recache:
                    self._recache(recache)
            case Flush(keep_last):
                for memory in memories:
                    memory.flush(keep_last)
            case Cut():
                for memory in memories:
                    memory.ledger.cut(event)

    def free(self) -> None:
        """Let go of every memory."""
        for memory in (self.memory, *self.caches.values()):
            memory.free()

    def _report(self, x0: Tensor, level: Level, chunk: Chunk) -> None:
        if self.callback is not None:
            chunks = len(self.given) + len(self.chunks) if isinstance(self.chunks, Sized) else None
            self.callback(Progress(chunk, chunks, chunk.levels.index(level), x0.detach()))

    def _remember(self, x0: Tensor, chunk: Chunk) -> None:
        """Hold a clean chunk until no recache can need it."""
        self.recent.append((x0, chunk))
        frames = sum(each.length for _, each in self.recent)
        while frames - self.recent[0][1].length >= self.timeline.recached:
            frames -= self.recent.popleft()[1].length

    def _recache(self, frames: int) -> None:
        """Write the last chunks into memory anew, as many as hold `frames`; the sink stays unless
        they reach it."""
        chunks, count = [], 0
        for x0, chunk in reversed(self.recent):
            if count >= frames:
                break
            chunks.insert(0, (x0, chunk))
            count += chunk.length
        sink = self.memory.plan.sink_frames
        whole = bool(chunks) and chunks[0][1].start == 0
        self.memory.flush(0, keep_sink=not whole)
        for x0, chunk in chunks:
            if whole or chunk.start >= sink:
                self._network(x0, 0.0, chunk, keys_only=True)
                self.memory.commit()

    def _network(
        self, x: Tensor, t: float, chunk: Chunk, keys_only: bool = False, keep_pending: Tensor | None = None,
        cache: Hashable = None,
    ) -> Tensor | None:  # fmt: skip
        timestep = torch.full((1, 1), t, dtype=torch.float64)
        view = self.cache(cache).view(chunk.frames, keep_pending)
        return self.network(
            x.to(self.network_dtype), timestep, self.text, view, keys_only=keys_only
        )


Sampler = Callable[[Rollout], Iterator[Tensor]]
