"""A first look at the bundle: clips that the base is weak at, beside the refined ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

from ..pictures import contact_sheet
from ..video import VideoWriter
from .bundle import bundled_refiner, load_sprite_network, load_sprite_text, load_sprite_vae
from .captions import Caption
from .clips import BATCH, held_out, student_clips
from .metrics.evaluate import ClipScores, evaluate_clip
from .metrics.table import summarise, totals_of

FRAMES_PER_ROW = 8
ENLARGED = 4  # magnification in a video
ON_SHEET = 2  # magnification on the sheet
COLOURS = {"base": (110, 110, 110), "refined": (30, 100, 230)}  # of names, in a pair's order
NAME_SIZE, NAME_MARGIN = 20, 6  # height of the letters and space beside the longest name, pixels
SCORES = ("object", "colour", "action", "quality", "total")
ENOUGH = 80.0  # the base's total from which there is little for a refiner to mend
MOST_TRIED = 256  # captions

ClipsOf = Callable[[Sequence[Caption]], Iterable[ndarray]]  # one clip a caption


def enlarged(pictures: ndarray, times: int) -> ndarray:
    """Enlarge every pixel of pictures [..., H, W, 3] to a square of times x times."""
    return pictures.repeat(times, axis=-3).repeat(times, axis=-2)


def name_plate(name: str, total: float, height: int) -> ndarray:
    """Draw a name of COLOURS and a score in white on a picture [height, W, 3]."""
    font = ImageFont.load_default(NAME_SIZE)
    width = 2 * NAME_MARGIN + round(max(map(font.getlength, COLOURS)))
    plate = Image.new("RGB", (width, height), COLOURS[name])
    text, middle = f"{name}\n{total:.1f}", (width / 2, height / 2)
    ImageDraw.Draw(plate).text(middle, text, fill="white", font=font, anchor="mm", align="center")
    return np.asarray(plate)


@dataclass(frozen=True, slots=True)
class Judged:
    """A clip with its caption and its exact scores."""

    caption: Caption
    clip: ndarray
    scores: ClipScores

    @classmethod
    def of(cls, caption: Caption, clip: ndarray) -> "Judged":
        """Score a clip."""
        return cls(caption, clip, evaluate_clip(clip, caption))

    @property
    def total(self) -> float:
        return totals_of(self.scores)["total"]


def weak_pairs(
    base_clips: ClipsOf, refined_clips: ClipsOf, count: int
) -> list[tuple[Judged, Judged]]:
    """Return the first held-out captions' clips whose base scores below ENOUGH: base and refined.

    At most `count`, out of MOST_TRIED captions. Both functions sample whole batches, because a
    clip's noise depends on its place in the batch.
    """
    pairs = []
    for first in range(0, MOST_TRIED, BATCH):
        captions = held_out(BATCH, first=first)
        base = map(Judged.of, captions, base_clips(captions))
        weak = [(place, judged) for place, judged in enumerate(base) if judged.total < ENOUGH]
        if weak := weak[: count - len(pairs)]:
            refined = [*refined_clips(captions)]
            pairs += [(judged, Judged.of(judged.caption, refined[at])) for at, judged in weak]
        if len(pairs) == count:
            break
    return pairs


def show(out: Path, count: int, seed: int, device: torch.device) -> Iterator[str]:
    """Write a video of each caption that the base is weak at, and a sheet; yields lines to print.

    The captions are those of weak_pairs. A video shows the base on the left, then the clip from
    the same noise by the bundle's refiner. The sheet has them below each other, each with its total
    score.
    """
    out.mkdir(parents=True, exist_ok=True)
    text, vae = load_sprite_text().to(device), load_sprite_vae().to(device)
    student = load_sprite_network("student", device=device)
    sampled = partial(student_clips, student, text, vae, seed=seed)
    pairs = weak_pairs(sampled, partial(sampled, refiner=bundled_refiner(student)), count)
    names = ", ".join(COLOURS)
    for number, pair in enumerate(pairs, start=1):
        path, text_of_pair = out / f"sprites_{number}.mp4", pair[0].caption.text
        frames = enlarged(np.concatenate([judged.clip for judged in pair], axis=2), ENLARGED)
        metadata = {"prompt": text_of_pair, "shown": names}
        with VideoWriter(path, frames.shape[2], frames.shape[1], metadata=metadata) as writer:
            writer.write(frames)
        totals = (f"{name} {judged.total:.1f}" for name, judged in zip(COLOURS, pair, strict=True))
        yield f"{path}: {text_of_pair} ({', '.join(totals)})"
    for name, column in zip(COLOURS, zip(*pairs, strict=True), strict=True):
        yield score_line(name, [judged.scores for judged in column])
    sheet = out / "sprites.png"
    write_sheet(pairs, sheet)
    yield (
        f"look at {sheet}: {FRAMES_PER_ROW} frames a clip, {names} below each other with"
        " their exact total; the captions are the first held-out ones where the base has less"
        f" than {ENOUGH:.0f}"
    )


def write_sheet(pairs: Sequence[tuple[Judged, Judged]], path: Path) -> None:
    """Write a sheet with a row for each clip, those of one caption below each other."""
    frames, plates = [], []
    for pair in pairs:
        for name, judged in zip(COLOURS, pair, strict=True):
            frames += [enlarged(frame, ON_SHEET) for frame in eight(judged.clip)]
            plates.append(name_plate(name, judged.total, len(frames[0])))
    contact_sheet(frames, path, columns=FRAMES_PER_ROW, marks=plates)


def eight(clip: ndarray) -> ndarray:
    """Return eight frames spread evenly over a clip."""
    return clip[np.linspace(0, len(clip) - 1, FRAMES_PER_ROW).astype(int)]


def score_line(name: str, scores: Sequence[ClipScores]) -> str:
    """Return a line of the mean scores of a name's clips."""
    summary = summarise(scores)
    means = ", ".join(f"{row} {summary[row].mean:.0f}" for row in SCORES)
    return f"{name}: {means} (0–100)"
