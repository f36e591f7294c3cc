"""Make the pictures of the page's list of templates: workflows/NAME.jpg.

`make thumbnails`, or `python tests/thumbnails.py NAME ...`; ComfyUI is needed for one. Each shows
frames of the video that its workflow writes; those that need published weights, and the training,
get a card.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import av
from comfy_graphs import API, NAMES, NEED_COMFYUI, WORKFLOWS
from page_pictures import server
from PIL import Image, ImageDraw, ImageFont

from autorefiner.nodes.cli import main

CARDS = {
    "self_forcing": "Self-Forcing", "self_forcing_refiner": "Self-Forcing\nwith a refiner",
    "start_image": "Self-Forcing\nfrom a picture", "longlive": "LongLive", "krea_14b": "Krea 14B",
    "train_a_refiner": "Train a refiner",
}  # fmt: skip
SIZE, ROWS = (640, 320), 2
GROUND, INK, TEXT = (23, 27, 38), (241, 244, 250), 60
QUALITY = 85


def frames_of(path: Path) -> list[Image.Image]:
    """Decode a video."""
    with av.open(str(path)) as video:
        return [frame.to_image() for frame in video.decode(video=0)]


def tiled(frames: Sequence[Image.Image]) -> Image.Image:
    """Return a picture of frames spread over a video, row by row."""
    width, height = frames[0].size
    high = SIZE[1] // ROWS
    wide = high * width // height
    count = ROWS * (SIZE[0] // wide)
    sheet = Image.new("RGB", SIZE, GROUND)
    for place in range(count):
        frame = frames[place * (len(frames) - 1) // (count - 1)]
        frame = frame.resize((wide, high), Image.Resampling.LANCZOS)
        row, column = divmod(place, count // ROWS)
        sheet.paste(frame, (column * wide, row * high))
    return sheet


def card(title: str) -> Image.Image:
    """Return a picture of a title."""
    sheet = Image.new("RGB", SIZE, GROUND)
    middle, font = (SIZE[0] / 2, SIZE[1] / 2), ImageFont.load_default(TEXT)
    ImageDraw.Draw(sheet).multiline_text(middle, title, INK, font, anchor="mm", align="center")
    return sheet


def video_of(name: str, folder: Path) -> Path:
    """Run a workflow, in ComfyUI if it needs that, and return the video that it writes."""
    path = API / f"{name}.json"
    if name in NEED_COMFYUI:
        with server() as running:
            running.run(json.loads(path.read_text(encoding="utf-8")))
            written = next((running.base / "output" / "video").glob(f"{name}_0*.mp4"))
            return written.rename(folder / written.name)
    if main(["run", str(path), "--out", str(folder)]):
        raise SystemExit(f"{name} did not run")
    return next((folder / "video").glob(f"{name}_0*.mp4"))


def make(names: Sequence[str]) -> None:
    """Make the thumbnails of workflows."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            card_of = CARDS.get(name)
            picture = card(card_of) if card_of else tiled(frames_of(video_of(name, Path(folder))))
        path = WORKFLOWS / f"{name}.jpg"
        picture.save(path, quality=QUALITY, optimize=True)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    make(sys.argv[1:] or NAMES)
