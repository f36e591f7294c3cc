"""Plan a run: check its size and count its memory before anything is loaded."""

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from .choices import choose
from .memory.plan import FirstFrames, Keys, MemoryPlan
from .memory.policies import POLICIES, Window
from .memory.policy import Policy
from .memory.positions import POSITIONS, Positions
from .memory.store import PlainStore, Store
from .schedule import TRAINED_FRAMES, Chunk, EndlessChunks, Level, Preset, plan_chunks
from .wan.transformer import WanConfig


def suggested(preset: Preset, policy: Policy) -> Preset:
    """Return the preset with the policy's window, sink and positions where it has none itself."""
    if policy.window and preset.window < 0:
        window, sink = policy.window
        preset = preset.changed(window=window, sink=sink)
    if policy.positions and preset.positions == "absolute":
        preset = replace(preset, positions=policy.positions)
    return preset


def for_length(preset: Preset, frames: int | None) -> Preset:
    """Return the preset with its memory for a clip of so many latent frames; None is endless.

    For users who choose no memory: a long clip gets the preset's `long_memory`, if chunks fit.
    """
    is_short = frames is not None and frames <= TRAINED_FRAMES
    if is_short or not preset.long_memory:
        return preset
    policy = choose(preset.long_memory, POLICIES, "memory")
    long = suggested(replace(preset, memory=preset.long_memory, chunk=1), policy)
    return replace(long, chunk=preset.chunk) if preset.chunk <= long.window - long.sink else preset


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run of `frames` new latent frames after `given` clean ones; `height`, `width` are latent.

    `frames` of None is a run without an end, which needs a window. `given_chunks` and `chunks` are
    the given and the new frames, cut into chunks.
    """

    preset: Preset
    frames: int | None
    height: int
    width: int
    batch: int = 1
    given: int = 0
    keys: Keys | None = None  # None: raw where the preset's positions move
    policy: Policy | None = None  # None: the preset's
    store: type[Store] = PlainStore
    cut: tuple[int, ...] = ()  # latent frames of each given chunk; empty: as the preset cuts them
    given_chunks: tuple[Chunk, ...] = field(init=False, repr=False, compare=False)
    chunks: tuple[Chunk, ...] | EndlessChunks = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.height < 2 or self.width < 2 or self.height % 2 or self.width % 2:
            raise ValueError(
                f"latents of {self.height}x{self.width}: height and width must be even and at"
                " least 2, so pixel sizes are multiples of 16"
            )
        if self.batch < 1:
            raise ValueError(f"batch of {self.batch}: ask for at least 1 video")
        if self.policy is None:
            object.__setattr__(self, "policy", choose(self.preset.memory, POLICIES, "memory"))
        if self.endless and self.preset.window < 0:
            window = 4 * self.preset.chunk
            raise ValueError(
                "an endless run with full history needs endless memory: give a window, like"
                f" --window {window} --sink {self.preset.chunk}"
            )
        given, new = plan_chunks(self.preset, self.frames, self.given, self.cut)
        object.__setattr__(self, "given_chunks", tuple(given))
        object.__setattr__(self, "chunks", new if self.endless else tuple(new))

    @property
    def endless(self) -> bool:
        """Whether the run has no end."""
        return self.frames is None

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels of the last new chunk; of an endless run, of all but the first."""
        if self.endless:
            return self.preset.chunk_levels()
        return self.chunks[-1].levels if self.chunks else ()

    @property
    def positions(self) -> Positions:
        """The rule for temporal positions."""
        return choose(self.preset.positions, POSITIONS, "positions")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Latent frames of every chunk, given ones first.

        Of an endless run, up to the second new chunk: all that follow are as long.
        """
        new = islice(self.chunks, 2) if self.endless else self.chunks
        return tuple(chunk.length for chunk in (*self.given_chunks, *new))

    def after(self, chunks: int) -> "RunPlan":
        """Return the plan with its first new chunks as given ones."""
        cut = self.lengths[: len(self.given_chunks) + chunks]
        given = sum(cut)
        return replace(self, given=given, frames=self.frames - (given - self.given), cut=cut)

    def memory(self, config: WanConfig, dtype: torch.dtype, refined: bool = False) -> MemoryPlan:
        """Plan the K/V memory of a network of these sizes; a refiner needs one more chunk of it."""
        total = self.preset.window + 1 if self.endless else self.given + self.frames
        plan = MemoryPlan.of(
            config,
            (self.batch, config.in_dim, total, self.height, self.width),
            window_frames=self.preset.window,
            sink_frames=self.preset.sink,
            keys=self.keys,
            positions=self.positions,
            dtype=dtype,
            spare_frames=self.preset.chunk if refined else 0,
            policy=self.policy,
            store=self.store,
        )
        plan.check_chunk(max(self.lengths))
        return plan

    def cache(self, name: Hashable, memory: MemoryPlan) -> MemoryPlan:
        """Plan a named cache of a run with this memory; by default it is a second one."""
        if not isinstance(name, FirstFrames):
            return memory
        window = name.frames + max(self.lengths)
        return replace(memory, window_frames=window, sink_frames=name.frames, policy=Window())

    def memories(
        self,
        config: WanConfig,
        dtype: torch.dtype,
        refined: bool = False,
        caches: Collection[Hashable] = (),
    ) -> list[MemoryPlan]:
        """Plan the run's memory and its named caches."""
        memory = self.memory(config, dtype, refined)
        return [memory, *(self.cache(name, memory) for name in caches)]

    def memory_bytes(
        self,
        config: WanConfig,
        dtype: torch.dtype,
        refined: bool = False,
        caches: Collection[Hashable] = (),
    ) -> int:
        """Count the bytes of the run's memory and of its named caches."""
        return sum(memory.nbytes for memory in self.memories(config, dtype, refined, caches))
