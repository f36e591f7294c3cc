"""What a person looks at first: a few prompts by the bundled models, base and refined side by
side."""

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
ENLARGED = 4  # a pixel of the sprite world to this many, squared, in a video
ON_SHEET = 2  # and on the sheet
SHOWN = {"sprites": "refined", "sprites-reward": "rewarded"}
COLOURS = {
    "base": (110, 110, 110),
    "refined": (30, 100, 230),
    "rewarded": (200, 105, 0),
}  # of what is behind a name
NAME_SIZE, NAME_MARGIN = 20, 6  # pixels: height of the letters, and space beside the longest name
SCORES = ("object", "colour", "action", "quality", "total")


def bundled_refiners(student: CausalWan) -> dict[str, Refiner]:
    """T_φ of each refiner that the bundle has, merged, by what the sheets call it."""
    found = {}
    for name, told in SHOWN.items():
        if (path := WEIGHTS / REFINERS[name]).exists():
            pairs, card = load_refiner(path)
            found[told] = Refiner(merged(student, pairs), card.cache, frozenset(card.levels))
    return found


def enlarged(pictures: ndarray, times: int) -> ndarray:
    """Pictures [..., H, W, 3] whose every pixel is a square of times x times."""
    return pictures.repeat(times, axis=-3).repeat(times, axis=-2)


def name_plate(name: str, height: int) -> ndarray:
    """Write a name of COLOURS in white on a picture [height, W, 3], whose width fits each of
    them."""
    font = ImageFont.load_default(NAME_SIZE)
    width = 2 * NAME_MARGIN + round(max(map(font.getlength, COLOURS)))
    plate = Image.new("RGB", (width, height), COLOURS[name])
    ImageDraw.Draw(plate).text((width / 2, height / 2), name, fill="white", font=font, anchor="mm")
    return np.asarray(plate)


def show(out: Path, count: int, seed: int, device: torch.device) -> Iterator[str]:
    """Write a video of each of the first held-out captions and one sheet of all; yields lines to
    print.

    Each video has the base on the left and to its right what the bundle's refiners make of the same
    noise: refined by the one that was trained by distribution matching, rewarded by the other. The
    sheet has them below each other, each row with its name.
    """
    out.mkdir(parents=True, exist_ok=True)
    text, vae = load_sprite_text().to(device), load_sprite_vae().to(device)
    student = load_sprite_network("student", device=device)
    captions = held_out(count)
    refiners = {"base": None, **bundled_refiners(student)}
    made = {
        name: list(student_clips(student, text, vae, captions, seed=seed, refiner=refiner))
        for name, refiner in refiners.items()
    }
    for number, caption in enumerate(captions):
        path = out / f"sprites_{number + 1}.mp4"
        told = {"prompt": caption.text, "shown": ", ".join(made)}
        frames = enlarged(
            np.concatenate([clips[number] for clips in made.values()], axis=2), ENLARGED
        )
        with VideoWriter(path, frames.shape[2], frames.shape[1], metadata=told) as writer:
            writer.write(frames)
        yield f"{path}: {caption.text}"
    yield from told_scores(made, captions)
    frames = [
        frame
        for clips in zip(*made.values(), strict=True)
        for clip in clips
        for frame in eight(clip)
    ]
    frames = [enlarged(frame, ON_SHEET) for frame in frames]
    plates = [name_plate(name, len(frames[0])) for name in made]
    contact_sheet(frames, out / "sprites.png", columns=FRAMES_PER_ROW, marks=plates)
    yield f"look at {out / 'sprites.png'}: {FRAMES_PER_ROW} frames a clip, {', '.join(made)} below each other"


def eight(clip: ndarray) -> ndarray:
    """Frames spread over a clip."""
    return clip[np.linspace(0, len(clip) - 1, FRAMES_PER_ROW).astype(int)]


def told_scores(made: dict[str, list[ndarray]], captions: list[Caption]) -> Iterator[str]:
    """A line of mean scores for each kind of clip."""
    for name, clips in made.items():
        found = summarise([evaluate_clip(*pair) for pair in zip(clips, captions, strict=True)])
        yield f"{name}: " + ", ".join(f"{row} {found[row].mean:.0f}" for row in SCORES) + " (0–100)"
