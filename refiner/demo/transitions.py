"""Measure how soon a new prompt rules, by transition and window: `demo transitions`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm

from ..memory.positions import Cut
from ..noise.source import VERSION as NOISE_VERSION
from ..run_plan import RunPlan
from ..sample import sample
from ..schedule import Preset, first_pixel_frame
from ..timeline import Flush, Keep, Recache, Scene, Timeline
from .bundle import FILES, WEIGHTS
from .captions import Caption
from .clips import PRESET, SIDE, decoded, held_out
from .evaluation import Demo
from .metrics.semantic import semantic_rows
from .metrics.table import aligned
from .metrics.track import find
from .motion import FPS
from .rows import weights_of

SWITCH = 12  # latent frames before the new caption: the largest window but `all` is full
WINDOWS = (6, 12, -1)
TRANSITIONS: dict[str, Scene] = {
    "keep": Scene(SWITCH, "", Keep()),
    "recache": Scene(SWITCH, "", Recache(SWITCH)),
    "flush 1": Scene(SWITCH, "", Flush(1)),
    "# (cut, flush 1)": Scene(SWITCH, "", Flush(1), Cut()),
}
Pair = tuple[Caption, Caption]  # the old one, the new one


@dataclass(frozen=True, slots=True)
class TransitionOptions:
    """The number of caption pairs, and of chunks that are watched after the switch."""

    pairs: int = 16
    chunks: int = 6


def caption_pairs(count: int) -> list[Pair]:
    """Return held-out captions by two whose objects share neither shape nor colour."""
    captions = held_out(8 * count)
    pairs = zip(captions[::2], captions[1::2], strict=True)
    return list(islice((pair for pair in pairs if not _looks(pair[0]) & _looks(pair[1])), count))


def _looks(caption: Caption) -> set[str]:
    return {word for stated in caption.objects for word in (stated.shape, stated.colour)}


def transitions(folder: Path, options: TransitionOptions, device: torch.device) -> str:
    """Measure what is missing; return a section of RESULTS.md without its heading.

    Each row's measurement stays in `folder`, so an interrupted command resumes with the next one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo.load(WEIGHTS, device)
    pairs = caption_pairs(options.pairs)
    lines = [["window", "transition", "chunks until it rules", "at once", "never", "new", "old"]]
    rows = [(window, name) for window in WINDOWS for name in TRANSITIONS]
    for window, name in tqdm(rows, "transitions", unit="row", dynamic_ncols=True):
        scores = measured(folder, demo, window, name, pairs, options.chunks)
        waits = [chunks_until(new - old) for new, old in scores]
        shown = "all" if window < 0 else str(window)
        lines.append([shown, name, *summary(waits, options.chunks), *ends(scores)])
    return f"{introduction(options)}\n\n{aligned(lines)}"


def introduction(options: TransitionOptions) -> str:
    """Say what the table shows."""
    return fill(
        f"{options.pairs} pairs of held-out captions whose objects share neither shape nor colour."
        f" A clip shows the old caption for {SWITCH} latent frames, then the new one takes over."
        f" After each of the next {options.chunks} chunks, the last second is scored under both"
        " captions (mean of object and colour, 0–100). The new caption rules from the first chunk"
        " on from which its score is above the old one's to the end. Chunks until it rules: median"
        " and quartiles over pairs, 0 is the first chunk of the new caption; `new` and `old` are"
        " the mean scores of the last chunk. Positions are relative, which a cut needs.",
        width=120,
    )


def measured(
    folder: Path, demo: Demo, window: int, name: str, pairs: Sequence[Pair], chunks: int
) -> ndarray:
    """Return a row's scores [pairs, 2, chunks], read from the folder if they are there."""
    weights = [weights_of(WEIGHTS / FILES[file]).hex() for file in ("student", "vae", "text")]
    key = repr((NOISE_VERSION, window, name, len(pairs), chunks, SWITCH, weights))
    path = folder / f"{list(TRANSITIONS).index(name)}-{window}.json"
    if path.exists() and (document := json.loads(path.read_text()))["key"] == key:
        return np.array(document["scores"])
    clips = sampled(demo, window, TRANSITIONS[name], pairs, chunks)
    scores = np.array([
        [[alignment(second, caption) for second in seconds_of(clip, chunks)] for caption in (b, a)]
        for clip, (a, b) in zip(clips, pairs, strict=True)
    ])  # fmt: skip
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps({"key": key, "scores": scores.tolist()}))
    temporary.replace(path)
    return scores


@torch.no_grad()
def sampled(
    demo: Demo, window: int, scene: Scene, pairs: Sequence[Pair], chunks: int
) -> list[ndarray]:
    """Sample and decode a clip of each pair."""
    preset: Preset = replace(PRESET.changed(window=window), positions="relative")
    before, after = (demo.text([pair[side].text for pair in pairs]) for side in (0, 1))
    timeline: Timeline[Tensor] = Timeline((Scene(0, before), replace(scene, prompt=after)))
    plan = RunPlan(preset, SWITCH + chunks * preset.chunk, SIDE, SIDE, batch=len(pairs))
    latents = torch.cat(list(sample(demo.student, timeline, plan)), dim=2)
    return list(decoded(demo.vae, latents))


def seconds_of(clip: ndarray, chunks: int) -> list[ndarray]:
    """Return the second of frames that each chunk after the switch ends."""
    ends = [first_pixel_frame(SWITCH + PRESET.chunk * (chunk + 1)) for chunk in range(chunks)]
    return [clip[end - FPS : end] for end in ends]


def alignment(second: ndarray, caption: Caption) -> float:
    """Score frames against a caption by its objects and colours, 0-100."""
    rows = semantic_rows(find(second), caption)
    return (rows.object + rows.colour) / 2


def chunks_until(leads: ndarray) -> float:
    """Return the chunks before the leads of the new caption stay above 0; infinity if never."""
    behind = np.flatnonzero(leads <= 0)
    if not len(behind):
        return 0
    return float(behind[-1] + 1) if behind[-1] + 1 < len(leads) else float("inf")


def summary(waits: Sequence[float], chunks: int) -> list[str]:
    """Return the cells of a row: median with quartiles, and the shares of 0 and of never."""
    low, middle, high = np.quantile(waits, (0.25, 0.5, 0.75), method="higher")
    shown = [f"{wait:.0f}" if np.isfinite(wait) else f">= {chunks}" for wait in (middle, low, high)]
    shares = [np.mean(np.array(waits) == wait) for wait in (0, np.inf)]
    return [f"{shown[0]} ({shown[1]} to {shown[2]})", *(f"{100 * share:.0f} %" for share in shares)]


def ends(scores: ndarray) -> list[str]:
    """Return the mean scores of the last chunk, under the new and the old caption."""
    return [f"{mean:.0f}" for mean in scores[:, :, -1].mean(axis=0)]
