"""Noise levels, chunks and the presets of published models."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice, pairwise, repeat

import torch
from torch import Tensor

STEPS = 1000  # of the training schedule; a timestep is 1000 · sigma
FPS = 16


@dataclass(frozen=True, slots=True)
class Level:
    """A noise level."""

    step: int  # nominal, its name
    t: float  # timestep for the network
    sigma: float  # in [0, 1]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive latent frames that are denoised together."""

    index: int  # among all chunks of the run, given ones included
    start: int  # absolute first latent frame
    length: int  # latent frames
    levels: tuple[Level, ...]  # from pure noise down; none for given frames

    @property
    def frames(self) -> tuple[int, ...]:
        """Absolute latent frame indices."""
        return tuple(range(self.start, self.start + self.length))


@lru_cache(maxsize=8)
def sigma_table(shift: float) -> Tensor:
    """Return the 1000 shifted sigmas of Wan's flow-matching schedule, falling from 1, in fp32.

    σ = s·u / (1 + (s − 1)·u) for u from 1 down.
    """
    u = torch.linspace(1, 0, STEPS + 1)[:-1]
    return shift * u / (1 + (shift - 1) * u)


def make_level(step: int, shift: float, warp: bool) -> Level:
    """Make a level from its nominal step.

    With `warp` the step is an index into the shifted table, else a timestep. Sigma is the nearest
    entry of the table, as in the reference implementation.
    """
    table = sigma_table(shift)
    timesteps = table * STEPS
    t = timesteps[STEPS - step] if warp else torch.tensor(float(step))
    return Level(step, float(t), float(table[(timesteps - t).abs().argmin()]))


@dataclass(frozen=True, slots=True)
class Preset:
    """Sampling configuration of a published model; levels are nominal, frames are latent."""

    levels: tuple[int, ...]
    warp: bool
    shift: float
    chunk: int
    first_levels: tuple[int, ...] = ()  # of the first chunk; empty: as the others
    first_alone: bool = False  # an independent first frame: chunks of 1, n, n, …
    window: int = -1  # -1: full history
    sink: int = 0
    positions: str = "absolute"  # one of refiner.memory.positions.POSITIONS, with knobs
    memory: str = "window"  # one of refiner.memory.policies.POLICIES, with knobs
    long_memory: str = ""  # the same, for clips longer than TRAINED_FRAMES; empty: as others
    recache: int = -1  # frames that a prompt switch rewrites in memory; -1: the window
    source: str = field(default="", repr=False, compare=False)  # repository or model

    def __post_init__(self) -> None:
        for levels in (self.levels, self.first_levels or self.levels):
            check_levels(levels)
        if not self.shift > 0:
            raise ValueError(f"shift {self.shift} is not positive: Wan models use 3 to 8")
        if self.chunk < 1:
            raise ValueError(f"{self.chunk} frames a chunk: give at least 1")
        if self.sink < 0 or self.window < -1:
            raise ValueError(
                f"window {self.window}, sink {self.sink}: frames are not negative, a window of -1"
                " is all"
            )
        if self.window >= 0 and self.window < self.sink + self.chunk:
            raise ValueError(
                f"window of {self.window} frames is smaller than sink {self.sink} + chunk"
                f" {self.chunk}: use a window of at least {self.sink + self.chunk}, or -1 for full"
                " history"
            )

    @property
    def all_levels(self) -> tuple[int, ...]:
        """Nominal levels of all chunks, from the highest down."""
        return tuple(sorted({*self.levels, *self.first_levels}, reverse=True))

    def chunk_levels(self, first: bool = False) -> tuple[Level, ...]:
        """Return the levels of a chunk, from pure noise down."""
        levels = self.first_levels if first and self.first_levels else self.levels
        return tuple(make_level(step, self.shift, self.warp) for step in levels)

    def changed(self, **changes) -> "Preset":
        """Return a copy with the changes that are not None."""
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(self, **given)


def check_levels(levels: Sequence[int]) -> None:
    """Raise ValueError unless nominal levels fall strictly, from at most 1000 to at least 1."""
    falling = all(above > below for above, below in pairwise(levels))
    if not levels or not falling or levels[0] > STEPS or levels[-1] < 1:
        listed = ",".join(map(str, levels)) or "nothing"
        raise ValueError(
            f"levels {listed}: give levels that fall strictly within 1000..1, like 1000,750,500,250"
        )


TRAINED_FRAMES = 21  # latent frames of the clips that the models are trained on
ONE = (1000,)
TWO = (1000, 500)
THREE = (1000, 757, 522)
FOUR = (1000, 750, 500, 250)
FIVE = (1000, 800, 600, 400, 200)
RELATIVE = "relative"
ADJACENT = "sink-adjacent"

# fmt: off
# From the inference configuration of each public repository; windows count sink, past and chunk.
PRESETS: dict[str, Preset] = {
    #                                  levels warp shift chunk
    "self-forcing":             Preset(FOUR,  True,  5.0, 3, long_memory="deep-sink",
                                       source="guandeh17/Self-Forcing dmd"),
    "causvid":                  Preset(THREE, False, 8.0, 3,
                                       source="tianweiy/CausVid autoregressive"),
    "longlive":                 Preset(FOUR,  True,  5.0, 3, window=12, sink=3, recache=12,
                                       source="NVlabs/LongLive v1.0"),
    "causal-forcing":           Preset(FOUR,  True,  5.0, 3,
                                       source="thu-ml/Causal-Forcing chunkwise"),
    "causal-forcing-framewise": Preset(FOUR,  True,  5.0, 1,
                                       source="thu-ml/Causal-Forcing framewise"),
    "causal-forcing-2step":     Preset(TWO,   True,  5.0, 1, FOUR,
                                       source="Causal-Forcing++ 2-step"),
    "causal-forcing-1step":     Preset(ONE,   True,  5.0, 1, FOUR,
                                       source="Causal-Forcing++ 1-step"),
    # Krea's server recomputes 3 context frames (first, last two) a chunk; here their K/V stay.
    "krea-14b":                 Preset(FOUR,  True,  8.0, 3, window=6, sink=1, positions=RELATIVE,
                                       source="krea-ai/realtime-video, context kept"),
    "raven":                    Preset(FOUR,  True,  5.0, 3, source="RAVEN and CM-GRPO"),
    "reward-forcing":           Preset(FOUR,  True,  5.0, 3, window=9, sink=3, positions=ADJACENT,
                                       memory="ema-sink", source="Reward Forcing"),
    "infinite-forcing":         Preset(FOUR,  True,  5.0, 3, window=6, sink=1, positions=RELATIVE,
                                       source="Infinite-Forcing"),
    "one-forcing":              Preset(ONE,   True,  5.0, 1, source="One-Forcing infer.sh"),
    "opsd-v":                   Preset(FOUR,  True,  5.0, 3, window=12, sink=3, positions=RELATIVE,
                                       source="OPSD-V LoRAs"),
    "self-forcing-14b":         Preset(FOUR,  True,  5.0, 3,
                                       source="LightX2V self_forcing_dmd_14b"),
    "longlive-14b":             Preset(FOUR,  True,  5.0, 3, window=12, sink=3, recache=12,
                                       source="LongLive 1's settings at 14B"),
    # With method rolling: sink, 3 past frames and a joint window of 15.
    "rolling-forcing":          Preset(FIVE,  True,  5.0, 3, window=21, sink=3,
                                       positions="sink-adjacent",
                                       source="TencentARC/RollingForcing, method rolling"),
    "streamdiffusion-v2":       Preset(FOUR,  False, 8.0, 3,
                                       source="StreamDiffusionV2, text to video"),
}
# fmt: on


def get_preset(name: str) -> Preset:
    """Return a preset by name; ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known: use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def latent_frames(pixel_frames: int) -> int:
    """Convert 1 + 4n pixel frames to latent frames; ValueError names the nearest lengths."""
    if pixel_frames < 1 or (pixel_frames - 1) % 4:
        below = max(1, 1 + 4 * ((pixel_frames - 1) // 4))
        raise ValueError(
            f"{pixel_frames} frames: a clip has 1 + 4n pixel frames, the nearest are {below} and"
            f" {below + 4}"
        )
    return 1 + (pixel_frames - 1) // 4


def first_pixel_frame(latent_frame: int) -> int:
    """Return the first pixel frame that a latent frame decodes to, both counted from 0."""
    return max(0, 4 * latent_frame - 3)


def chunk_lengths(frames: int, chunk: int, first_alone: bool) -> list[int]:
    """Cut latent frames into chunks; the last may be shorter, the first a single frame."""
    alone = [1] if first_alone and frames else []
    whole, left = divmod(frames - len(alone), chunk)
    return alone + [chunk] * whole + ([left] if left else [])


def cut_chunks(preset: Preset, lengths: Iterable[int], given: int = 0) -> Iterator[Chunk]:
    """Yield chunks of these lengths; the first `given` of them have no levels."""
    first, usual = preset.chunk_levels(first=True), preset.chunk_levels()
    start = 0
    for index, length in enumerate(lengths):
        levels = () if index < given else usual if index else first
        yield Chunk(index, start, length, levels)
        start += length


@dataclass(frozen=True, slots=True)
class EndlessChunks:
    """The new chunks of a run without an end, after `given` chunks of these lengths.

    Yields them anew on every iteration; it has no length.
    """

    preset: Preset
    given: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Chunk]:
        alone = [1] if self.preset.first_alone and not self.given else []
        lengths = chain(self.given, alone, repeat(self.preset.chunk))
        chunks = cut_chunks(self.preset, lengths, len(self.given))
        yield from islice(chunks, len(self.given), None)


def plan_chunks(
    preset: Preset, frames: int | None, given: int = 0, cut: Sequence[int] = ()
) -> tuple[list[Chunk], list[Chunk] | EndlessChunks]:
    """Cut `given` clean latent frames and the `frames` new ones that follow into chunks.

    `frames` of None is a run without an end. Given chunks have no levels. Given frames are 1,
    k·chunk or 1 + k·chunk (then the first frame is a chunk of its own), else ValueError; without
    new frames any number is allowed. `cut` are the lengths of the given chunks, where known.
    """
    if frames is not None and frames < (0 if given else 1):
        raise ValueError(f"{frames} new latent frames: ask for at least 1")
    if frames != 0 and given % preset.chunk not in (0, 1) and given != 1:
        raise ValueError(
            f"{given} latent frames to start from: give 1, a multiple of {preset.chunk}, or one"
            " more than a multiple"
        )
    alone = given % preset.chunk == 1 and preset.chunk > 1
    lengths = list(cut) or chunk_lengths(given, preset.chunk, alone)
    past = len(lengths)
    if frames is None:
        given_chunks = list(cut_chunks(preset, lengths, past))
        return given_chunks, EndlessChunks(preset, tuple(lengths))
    lengths += chunk_lengths(frames, preset.chunk, preset.first_alone and not given)
    chunks = list(cut_chunks(preset, lengths, past))
    return chunks[:past], chunks[past:]
