"""The verbs that sampling methods consist of: predict, renoise, commit, fork/select, event."""

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
    "add_noise",
    "predict_x0",
]


class Memory(Protocol):
    """Keys and values of past frames (refiner/memory)."""

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
    chunks: int | None  # number of chunks, given ones included; None where the end is unknown
    level: int  # index into chunk.levels
    x0: Tensor  # [B, C, F, h, w], the prediction


def predict_x0(x: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """Return x0 = x_t − σ v, computed in float64 where the device has it, in the dtype of x."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return (x.to(wide) - sigma * flow.to(wide)).to(x.dtype)


def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return Ψ(x0, ε) = (1 − σ) x0 + σ ε (AutoRefiner eq. 4, where σ = 1 is pure noise)."""
    return (1 - sigma) * x0 + sigma * noise


def latents_of(chunk: Chunk, latents: Tensor) -> Tensor:
    """Slice a chunk's frames from a whole clip [B, C, F, h, w]."""
    return latents[:, :, chunk.start : chunk.start + chunk.length]


@dataclass(slots=True)
class Rollout:
    """State of a sampling run: the network, its prompt, its memory and its noise path.

    Latents are [B, C, F, h, w], normalised, in `dtype`; the network runs in `network_dtype`.
    Iterating over a rollout yields its new chunks, and applies a timeline's events before the chunk
    that they precede.
    """

    network: CausalWan
    text: list[KeyValue]
    memory: Memory
    noise: NoiseSource
    chunks: Iterable[Chunk]  # new chunks; may be an iterator without a known end
    frame_shape: tuple[int, int, int, int]  # [B, C, h, w]
    device: torch.device
    network_dtype: torch.dtype
    dtype: torch.dtype = torch.float32
    callback: Callable[[Progress], None] | None = None
    given: Sequence[tuple[Tensor, Chunk]] = ()  # clean latents that the new chunks follow
    source: Tensor | None = None  # clean latents [B, C, F, h, w] that the new chunks start from
    candidate: int = 0
    refiner: Refiner | None = None
    refiner_text: list[KeyValue] | None = None
    timeline: Timeline[Tensor] | None = None
    context: Tensor | None = None  # the prompt in force, as the timeline holds it
    caches: Mapping[Hashable, Memory] = field(default_factory=dict)  # besides `memory`, by name
    last: Chunk | None = None  # set once the iteration has reached it: it is not committed
    before: Chunk | None = None  # the chunk that was entered last
    # committed x0s that a recache may need
    recent: deque[tuple[Tensor, Chunk]] = field(default_factory=deque)

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
        source: Tensor | None = None,
        callback: Callable[[Progress], None] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Rollout":
        """Prepare the run of a plan.

        `context` is [1 or B, L, text_dim], or a timeline of contexts; `initial` holds the plan's
        given clean latents, `source` those of another clip, from which the chunks start. `device`
        and `dtype` of a pass default to those of the weights; a host that stores weights elsewhere
        passes those it computes with.
        """
        parameter = next(network.model.parameters())
        device, dtype = device or parameter.device, dtype or parameter.dtype
        timeline = context if isinstance(context, Timeline) else Timeline.of(context)
        opening = timeline.scenes[0].prompt.to(device, dtype)
        memory_plan = plan.memory(network.config, dtype, refined=refiner is not None)
        memory_plan = replace(memory_plan, rope=network.kernels.rotate)
        return cls(
            network=network,
            text=network.text(opening, plan.batch),
            memory=memory(memory_plan, device),
            noise=noise,
            chunks=plan.chunks,
            frame_shape=(plan.batch, network.config.in_dim, plan.height, plan.width),
            device=device,
            network_dtype=dtype,
            callback=callback,
            given=[
                (latents_of(chunk, initial).to(device, torch.float32), chunk)
                for chunk in plan.given_chunks
            ],
            source=source,
            refiner=refiner,
            refiner_text=refiner.text(opening, plan.batch) if refiner else None,
            timeline=timeline,
            context=timeline.scenes[0].prompt,
            caches={name: memory(plan.cache(name, memory_plan), device) for name in caches},
        )

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the new chunks, each after the timeline's events before it."""
        chunks = iter(self.chunks)
        chunk = next(chunks, None)
        while chunk is not None:
            following = next(chunks, None)
            self.last = chunk if following is None else None
            self.enter(chunk)
            yield chunk
            chunk = following

    def enter(self, chunk: Chunk) -> None:
        """Apply the timeline's events before this chunk."""
        events = self.timeline.events(chunk, self.before) if self.timeline else ()
        for event in events:
            self.event(event)
        self.before = chunk

    def commit_given(self) -> None:
        """Commit the given latents to every memory."""
        for latents, chunk in self.given:
            self.enter(chunk)
            for name in (None, *self.caches):
                self.commit(latents, chunk, cache=name)

    def cache(self, name: Hashable = None) -> Memory:
        """Return a memory by name; None is the main one."""
        return self.memory if name is None else self.caches[name]

    def begin(self, chunk: Chunk) -> Tensor:
        """Return the latents that a chunk starts from, at its first level.

        They are its initial noise, or the source's frames under as much of it as the level has.
        """
        level = chunk.levels[0]
        if self.source is None:
            return self.draw(chunk, level)
        x0 = latents_of(chunk, self.source).to(self.device, self.dtype)
        return self.renoise(x0, level, chunk)

    def draw(
        self,
        chunk: Chunk,
        level: Level,
        repeat: int = 0,
        x0: Tensor | None = None,
        cache: Hashable = None,
    ) -> Tensor:
        """Draw noise for a chunk and level; at the chunk's first level, its initial noise.

        The noise is the source's, plus the refiner's residual where the level is refined. `x0` is
        the prediction at the level before.
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
        """Return the refiner's residual for a noise."""
        memory, text = self.cache(cache), self.refiner_text
        return self.refiner.residual(noise, x0, level, chunk, memory, text, self.network_dtype)

    @property
    def reads_pending(self) -> bool:
        """Whether the refiner reads the keys and values that a prediction left pending."""
        return self.refiner is not None and self.refiner.cache.previous == "pending"

    def predict(
        self,
        x: Tensor,
        level: Level,
        chunk: Chunk,
        keep_pending: Tensor | None = None,
        cache: Hashable = None,
    ) -> Tensor:
        """Predict x0 of the chunk; leave its keys and values in memory as pending.

        Where keep_pending[b], the cached K/V of sample b are left untouched; ignore its x0.
        """
        flow = self._network(x, level.t, chunk, keep_pending=keep_pending, cache=cache)
        x0 = predict_x0(x, flow, level.sigma)
        self._report(x0, level, chunk)
        return x0

    def predict_together(
        self, inputs: Sequence[tuple[Tensor, Level, Chunk]], cache: Hashable = None
    ) -> list[Tensor]:
        """Predict the x0s of neighbouring chunks in one pass, each at its own level.

        The chunks attend to each other. The window must have room for all of them. They are
        reported newest first: a sampler finishes the oldest.
        """
        frames = tuple(frame for _, _, chunk in inputs for frame in chunk.frames)
        times = [level.t for _, level, chunk in inputs for _ in chunk.frames]
        times = times[:1] if len(set(times)) == 1 else times
        x = torch.cat([x for x, _, _ in inputs], dim=2).to(self.network_dtype)
        view = self.cache(cache).view(frames)
        flow = self.network(x, torch.tensor([times], dtype=torch.float64), self.text, view)
        flows = flow.split([chunk.length for _, _, chunk in inputs], dim=2)
        results = [
            predict_x0(x, flow, level.sigma)
            for (x, level, _), flow in zip(inputs, flows, strict=True)
        ]
        for x0, (_, level, chunk) in reversed(list(zip(results, inputs, strict=True))):
            self._report(x0, level, chunk)
        return results

    def renoise(
        self, x0: Tensor, level: Level, chunk: Chunk, repeat: int = 0, cache: Hashable = None
    ) -> Tensor:
        """Take x0 to `level` with fresh noise from the noise path.

        `repeat` 0 is the level's first draw; count further draws of it from 1.
        """
        return add_noise(x0, self.draw(chunk, level, repeat, x0, cache), level.sigma)

    def commit(self, x: Tensor, chunk: Chunk, t: float = 0.0, cache: Hashable = None) -> None:
        """Write the chunk's keys and values at timestep t to memory, by one pass over its latents.

        Does nothing for the last chunk of the run, which no later chunk would read.
        """
        if chunk == self.last:
            return
        self._network(x, t, chunk, keys_only=True, cache=cache)
        self.cache(cache).commit()
        if cache is None and self.timeline is not None and self.timeline.recached:
            self._remember(x, chunk)

    def commit_pending(self) -> None:
        """Commit the keys and values of the last prediction, without a pass (diagonal forcing)."""
        self.memory.commit()

    def fork(self, n: int) -> "list[Rollout]":
        """Return `n` candidates that share this memory; each draws other noise.

        Candidate 0 draws the same noise as this rollout. Each prediction overwrites the chunk's
        place in memory, so commit the chosen one.
        """
        return [replace(self, candidate=self.candidate * n + i) for i in range(n)]

    def select(self, candidates: Sequence[Tensor], scores: Tensor) -> Tensor:
        """Select the best candidate of each sample; `scores` is [candidates, B]."""
        if scores.shape != (len(candidates), self.frame_shape[0]):
            raise ValueError(
                f"scores have shape {tuple(scores.shape)}, expected [{len(candidates)} candidates,"
                f" {self.frame_shape[0]} samples]: score every candidate of every sample"
            )
        if not scores.isfinite().all():
            raise ValueError(
                "a score is NaN or infinite, so candidates cannot be compared: check the reward's"
                " model"
            )
        best = scores.argmax(0)
        return torch.stack(list(candidates))[best, torch.arange(len(best), device=best.device)]

    def event(self, event: Event) -> None:
        """Apply an event between two chunks: a prompt switch, a flush of the past, a cut."""
        memories = (self.memory, *self.caches.values())
        match event:
            case PromptSwitch(context, recache, protect_sink):
                if self.context is not None and torch.equal(context.to(self.context), self.context):
                    return
                self._set_prompt(context)
                if recache:
                    self._recache(recache, protect_sink)
            case Flush(keep_last):
                for memory in memories:
                    memory.flush(keep_last)
            case Cut():
                for memory in memories:
                    memory.ledger.cut(event)

    def free(self) -> None:
        """Free every memory."""
        for memory in (self.memory, *self.caches.values()):
            memory.free()

    def _report(self, x0: Tensor, level: Level, chunk: Chunk) -> None:
        if self.callback is not None:
            chunks = len(self.given) + len(self.chunks) if isinstance(self.chunks, Sized) else None
            self.callback(Progress(chunk, chunks, chunk.levels.index(level), x0.detach()))

    def _remember(self, x0: Tensor, chunk: Chunk) -> None:
        """Store a clean chunk until no recache can need it."""
        self.recent.append((x0, chunk))
        frames = sum(each.length for _, each in self.recent)
        while frames - self.recent[0][1].length >= self.timeline.recached:
            frames -= self.recent.popleft()[1].length

    def _set_prompt(self, context: Tensor) -> None:
        """Use another context from the next pass on."""
        on_device, batch = context.to(self.device, self.network_dtype), self.frame_shape[0]
        self.text, self.refiner_text = [], None  # never two prompts in memory
        self.text = self.network.text(on_device, batch)
        self.refiner_text = self.refiner.text(on_device, batch) if self.refiner else None
        self.context = context

    def _recache(self, frames: int, protect_sink: bool) -> None:
        """Rewrite the last chunks of at least `frames` in memory; drop all others but the sink."""
        if self.caches:
            raise ValueError(
                "a recache rewrites one memory, and this method has several: use `keep` or `flush`"
            )
        chunks, count = [], 0
        for x0, chunk in reversed(self.recent):
            if count >= frames:
                break
            chunks.insert(0, (x0, chunk))
            count += chunk.length
        sink = self.memory.plan.sink_frames if protect_sink else 0
        self.memory.flush(0, keep_sink=protect_sink)
        for x0, chunk in chunks:
            protected = max(0, sink - chunk.start)  # frames of the chunk that lie in the sink
            if protected < chunk.length:
                rest = replace(
                    chunk, start=chunk.start + protected, length=chunk.length - protected
                )
                self._network(x0[:, :, protected:], 0.0, rest, keys_only=True)
                self.memory.commit()

    def _network(
        self,
        x: Tensor,
        t: float,
        chunk: Chunk,
        keys_only: bool = False,
        keep_pending: Tensor | None = None,
        cache: Hashable = None,
    ) -> Tensor | None:
        x = x.to(self.network_dtype)
        timestep = torch.full((1, 1), t, dtype=torch.float64)
        view = self.cache(cache).view(chunk.frames, keep_pending)
        return self.network(x, timestep, self.text, view, keys_only=keys_only)
