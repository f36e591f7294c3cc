"""Rolling Forcing: denoise a window of chunks in one pass, cleaner toward the past.

With T levels the window holds T chunks, which attend to each other and to the committed past. Each
slide takes every chunk one level down; the leading one, now at its last level, is committed and
leaves. N chunks take N + T - 1 passes over at most T chunks, and a commit each. For weights that
were trained with such a window.
"""

from collections.abc import Iterator

from torch import Tensor

from ..memory.reflect import ReflectiveCache
from ..rollout import Rollout
from ..schedule import Preset
from ..timeline import Timeline
from .method import Method
from .waves import check_levels, waves


def rolling() -> Method:
    """Denoise as many chunks together as there are levels. With one level it is Self-Forcing."""
    return Method(
        "rolling", run, check=check, check_timeline=check_timeline, together=len, goes_on=False
    )


def check(preset: Preset, cache: ReflectiveCache | None) -> None:
    """Raise ValueError for a window without room for the chunks, and for a refiner."""
    check_levels("rolling", preset)
    frames = preset.chunk * len(preset.levels)
    if 0 <= preset.window < preset.sink + frames:
        raise ValueError(
            f"rolling denoises {len(preset.levels)} chunks of {preset.chunk} frames together, and a"
            f" window of {preset.window} has no room for them and a sink of {preset.sink}: use a"
            f" window of at least {preset.sink + frames}, or fewer levels"
        )
    if cache is not None:
        raise ValueError(
            "rolling predicts several chunks in a pass, and a refiner reads the keys of a pass over"
            " one: use another method, or no refiner"
        )


def check_timeline(timeline: Timeline) -> None:
    """Raise ValueError for a cut, which would move the whole window away from its past.

    Any other prompt holds, for the whole window, from the pass on that its first chunk enters.
    """
    if timeline.cuts:
        raise ValueError(
            "rolling denoises the chunks before and after a cut together: use another transition,"
            " or another method"
        )


def run(rollout: Rollout) -> Iterator[Tensor]:
    """Yield the x0 [B, C, F, h, w] of each chunk as it leaves the window."""
    latents: dict[int, Tensor] = {}  # of the window, by a chunk's index
    for wave in waves(rollout):
        newest = wave[-1]
        if newest.chunk.index not in latents:
            latents[newest.chunk.index] = rollout.begin(newest.chunk)
        inputs = [(latents[chunk.index], level, chunk) for chunk, level, _ in wave]
        predictions = rollout.predict_together(inputs)
        for (chunk, _, below), x0 in zip(wave, predictions, strict=True):
            if below is not None:
                latents[chunk.index] = rollout.renoise(x0, below, chunk)
        leading, _, below = wave[0]
        if below is None:
            del latents[leading.index]
            rollout.commit(predictions[0], leading)
            yield predictions[0]
