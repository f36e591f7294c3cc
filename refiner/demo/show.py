"""A first look at the bundle: clips that the base is weak at, beside the refined ones."""

from collections.abc import Callable, Iterable, Iterator
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
COLOURS = {"base": (110, 110, 110), "refined": (30, 100, 230)}  # backgrounds of the names
NAME_SIZE, NAME_MARGIN = 20, 6  # height of the letters and space beside the longest name, pixels
SCORES = ("object", "colour", "action", "quality", "total")
ENOUGH = 80.0  # the base's total from which there is little for a refiner to mend
MOST_TRIED = 256  # captions


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


def weak_clips(
    clips_of: Callable[[list[Caption]], Iterable[ndarray]], count: int
) -> tuple[list[Caption], list[ndarray], list[ClipScores]]:
    """Return the first held-out captions whose clips score below ENOUGH, their clips and scores.

    At most `count`, out of MOST_TRIED captions.
    """
    captions, clips, scores = [], [], []
    for first in range(0, MOST_TRIED, BATCH):
        tried = held_out(BATCH, first=first)
        for caption, clip in zip(tried, clips_of(tried), strict=True):
            judged = evaluate_clip(clip, caption)
            if totals_of(judged)["total"] < ENOUGH and len(captions) < count:
                captions.append(caption)
                clips.append(clip)
                scores.append(judged)
        if len(captions) == count:
            break
    return captions, clips, scores


def show(out: Path, count: int, seed: int, device: torch.device) -> Iterator[str]:
    """Write a video of each caption that the base is weak at, and a sheet; yields lines to print.

    The captions are weak_clips'. A video shows the base on the left, then the clip from the same
    noise by the bundle's refiner. The sheet has them below each other, each with its total score.
    """
    out.mkdir(parents=True, exist_ok=True)
    text, vae = load_sprite_text().to(device), load_sprite_vae().to(device)
    student = load_sprite_network("student", device=device)
    sampled = partial(student_clips, student, text, vae, seed=seed)
    captions, weak, scores_of_weak = weak_clips(sampled, count)
    refined = [*sampled(captions, refiner=bundled_refiner(student))]
    scores_of_refined = [evaluate_clip(*pair) for pair in zip(refined, captions, strict=True)]
    clips = {"base": weak, "refined": refined}
    scores = {"base": scores_of_weak, "refined": scores_of_refined}
    for number, caption in enumerate(captions):
        path = out / f"sprites_{number + 1}.mp4"
        metadata = {"prompt": caption.text, "shown": ", ".join(clips)}
        beside = np.concatenate([each[number] for each in clips.values()], axis=2)
        frames = enlarged(beside, ENLARGED)
        with VideoWriter(path, frames.shape[2], frames.shape[1], metadata=metadata) as writer:
            writer.write(frames)
        totals = ", ".join(
            f"{name} {totals_of(each[number])['total']:.1f}" for name, each in scores.items()
        )
        yield f"{path}: {caption.text} ({totals})"
    yield from map(score_line, scores.items())
    sheet = out / "sprites.png"
    write_sheet(clips, scores, sheet)
    yield (
        f"look at {sheet}: {FRAMES_PER_ROW} frames a clip, {', '.join(clips)} below each other with"
        " their exact total; the captions are the first held-out ones where the base has less"
        f" than {ENOUGH:.0f}"
    )


def write_sheet(
    clips: dict[str, list[ndarray]], scores: dict[str, list[ClipScores]], path: Path
) -> None:
    """Write a sheet with a row for each clip, those of one caption below each other."""
    frames, plates = [], []
    for number in range(len(clips["base"])):
        for name, same in clips.items():
            frames += [enlarged(frame, ON_SHEET) for frame in eight(same[number])]
            plates.append(
                name_plate(name, totals_of(scores[name][number])["total"], len(frames[0]))
            )
    contact_sheet(frames, path, columns=FRAMES_PER_ROW, marks=plates)


def eight(clip: ndarray) -> ndarray:
    """Return eight frames spread evenly over a clip."""
    return clip[np.linspace(0, len(clip) - 1, FRAMES_PER_ROW).astype(int)]


def score_line(named: tuple[str, list[ClipScores]]) -> str:
    """Return a line of the mean scores of a name's clips."""
    name, scores = named
    summary = summarise(scores)
    means = ", ".join(f"{row} {summary[row].mean:.0f}" for row in SCORES)
    return f"{name}: {means} (0–100)"
