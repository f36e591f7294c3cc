"""A first look at the bundle: clips of a few prompts, base and refined side by side."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

from ..noise.file import load_refiner
from ..noise.refiner import Refiner, merged
from ..pictures import contact_sheet
from ..video import VideoWriter
from ..wan.causal import CausalWan
from .bundle import REFINERS, WEIGHTS, load_sprite_network, load_sprite_text, load_sprite_vae
from .captions import Caption
from .clips import held_out, student_clips
from .metrics.evaluate import evaluate_clip
from .metrics.table import summarise

FRAMES_PER_ROW = 8
ENLARGED = 4  # magnification in a video
ON_SHEET = 2  # magnification on the sheet
SHOWN = {"sprites": "refined", "sprites-reward": "rewarded"}  # refiner -> name on the sheet
# backgrounds of the names
COLOURS = {"base": (110, 110, 110), "refined": (30, 100, 230), "rewarded": (200, 105, 0)}
NAME_SIZE, NAME_MARGIN = 20, 6  # height of the letters and space beside the longest name, pixels
SCORES = ("object", "colour", "action", "quality", "total")


def bundled_refiners(student: CausalWan) -> dict[str, Refiner]:
    """Load the bundle's refiners, merged, by their names on the sheets."""
    refiners = {}
    for name, label in SHOWN.items():
        path = WEIGHTS / REFINERS[name]
        if path.exists():
            pairs, card = load_refiner(path)
            refiners[label] = Refiner(merged(student, pairs), card.cache, frozenset(card.levels))
    return refiners


def enlarged(pictures: ndarray, times: int) -> ndarray:
    """Enlarge every pixel of pictures [..., H, W, 3] to a square of times x times."""
    return pictures.repeat(times, axis=-3).repeat(times, axis=-2)


def name_plate(name: str, height: int) -> ndarray:
    """Draw a name of COLOURS in white on a picture [height, W, 3] wide enough for any of them."""
    font = ImageFont.load_default(NAME_SIZE)
    width = 2 * NAME_MARGIN + round(max(map(font.getlength, COLOURS)))
    plate = Image.new("RGB", (width, height), COLOURS[name])
    ImageDraw.Draw(plate).text((width / 2, height / 2), name, fill="white", font=font, anchor="mm")
    return np.asarray(plate)


def show(out: Path, count: int, seed: int, device: torch.device) -> Iterator[str]:
    """Write a video of each of the first held-out captions and one sheet; yields lines to print.

    Each video shows the base on the left, then clips from the same noise by the bundle's refiners:
    `refined` by the one trained by distribution matching, `rewarded` by the other. The sheet has
    them below each other, each row with its name.
    """
    out.mkdir(parents=True, exist_ok=True)
    text, vae = load_sprite_text().to(device), load_sprite_vae().to(device)
    student = load_sprite_network("student", device=device)
    captions = held_out(count)
    refiners = {"base": None, **bundled_refiners(student)}
    clips = {
        name: list(student_clips(student, text, vae, captions, seed=seed, refiner=refiner))
        for name, refiner in refiners.items()
    }
    for number, caption in enumerate(captions):
        path = out / f"sprites_{number + 1}.mp4"
        metadata = {"prompt": caption.text, "shown": ", ".join(clips)}
        beside = np.concatenate([each[number] for each in clips.values()], axis=2)
        frames = enlarged(beside, ENLARGED)
        with VideoWriter(path, frames.shape[2], frames.shape[1], metadata=metadata) as writer:
            writer.write(frames)
        yield f"{path}: {caption.text}"
    yield from score_lines(clips, captions)
    sheet = out / "sprites.png"
    write_sheet(clips, sheet)
    yield f"look at {sheet}: {FRAMES_PER_ROW} frames a clip, {', '.join(clips)} below each other"


def write_sheet(clips: dict[str, list[ndarray]], path: Path) -> None:
    """Write a sheet with a row for each clip, those of one caption below each other."""
    rows = [clip for same in zip(*clips.values(), strict=True) for clip in same]
    frames = [enlarged(frame, ON_SHEET) for clip in rows for frame in eight(clip)]
    plates = [name_plate(name, len(frames[0])) for name in clips]
    contact_sheet(frames, path, columns=FRAMES_PER_ROW, marks=plates)


def eight(clip: ndarray) -> ndarray:
    """Return eight frames spread evenly over a clip."""
    return clip[np.linspace(0, len(clip) - 1, FRAMES_PER_ROW).astype(int)]


def score_lines(clips: dict[str, list[ndarray]], captions: list[Caption]) -> Iterator[str]:
    """Yield a line of mean scores for each name's clips."""
    for name, same in clips.items():
        summary = summarise([evaluate_clip(*pair) for pair in zip(same, captions, strict=True)])
        means = ", ".join(f"{row} {summary[row].mean:.0f}" for row in SCORES)
        yield f"{name}: {means} (0–100)"
