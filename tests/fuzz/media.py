"""Hostile pictures and videos: damaged, larger than they look, or mislabelled."""

import random
import struct
import zlib
from pathlib import Path

from PIL import Image

from autorefiner.nodes.hosts import core_nodes, standalone
from autorefiner.refiner.video import (
    count_frames,
    playable_frames,
    read_frames,
    read_metadata,
    video_rate,
    video_size,
)

from .base import ESCAPES, Attempt, command, damaged

FORMATS = ("png", "jpg", "webp", "gif", "bmp", "tiff")
SUFFIXES = (*FORMATS, "mp4", "m3u8", "mkv", "txt", "concat", "sdp", "mpd", "svg", "psd", "ico")
PLAYLISTS = (
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}/secret.mp4\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile {secret}/secret.mp4\n",
    '<?xml version="1.0"?><MPD><Period><BaseURL>{secret}/secret.mp4</BaseURL></Period></MPD>',
    "v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    '<svg xmlns="http://www.w3.org/2000/svg"><image href="{secret}/secret.png"/></svg>',
    "#EXTM3U\nhttp://127.0.0.1:9/x.ts\n",
)  # fmt: skip

BOXES = (  # boxes of an .mp4 and their replacements
    (b"avc1", b"zzzz"),
    (b"avc1", b"av01"),
    (b"vide", b"vidf"),
    (b"stsd\0\0\0\0\0\0\0\1", b"stsd\0\0\0\0\0\0\0\0"),
    (b"moov", b"free"),
    (b"ftyp", b"fty\0"),
)


def png(width: int, height: int, body: bytes) -> bytes:
    """Return a 1-bit PNG that claims the given size."""

    def piece(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + piece(b"IHDR", header)
        + piece(b"IDAT", zlib.compress(body))
        + piece(b"IEND", b"")
    )


def bomb(choose: random.Random) -> bytes:
    """Return a PNG that decodes to far more memory than its bytes."""
    width, height = choose.choice(
        ((16000, 16000), (2**31 - 1, 1), (1, 2**31 - 1), (50_000, 50_000), (0, 0), (12_000, 9000))
    )
    rows = min(height, 16_000) if width <= 16_000 else 1
    return png(width, height, bytes(min(width, 16_000) // 8 + 1) * rows)


def picture(folder: Path, choose: random.Random) -> bytes:
    """Return a small picture in a random format, maybe with several frames."""
    path = folder / f"small.{choose.choice(FORMATS)}"
    width = choose.choice((1, 16, 64))
    frames = [Image.new("RGB", (width, 16), (200, shade, 0)) for shade in (0, 100, 200)]
    several = choose.random() < 0.3 and path.suffix in (".gif", ".webp", ".tiff", ".png")
    frames[0].save(path, **({"save_all": True, "append_images": frames[1:]} if several else {}))
    return path.read_bytes()


def pictures(folder: Path, choose: random.Random) -> Attempt:
    """A picture in the input folder, read by LoadImage and the nodes after it."""
    way = choose.randrange(6)
    if way == 0:
        content = bomb(choose)
    elif way == 1:
        content = choose.choice(PLAYLISTS).format(secret=folder.parent / "secret").encode()
    elif way == 2:
        content = (folder / "clip.mp4").read_bytes()
    else:
        content = damaged(picture(folder, choose), choose)
    path = folder / "input" / f"one.{choose.choice(SUFFIXES)}"
    path.write_bytes(content)
    size = choose.choice(((64, 64), (16384, 16384), (1, 16384)))
    place = standalone.Place(folder, folder / "output")

    def act() -> None:
        with standalone.running_at(place):
            image, _ = core_nodes.LoadImage.execute(path.name).args
            if choose.random() < 0.3:
                core_nodes.ImageScale.execute(image, "bilinear", *size, "center")
            if choose.random() < 0.3:
                core_nodes.ImageStitch.execute(image, "right", True, 0, "white", image)

    return Attempt(f"picture {path.suffix}", act)


def videos(folder: Path, choose: random.Random) -> Attempt:
    """A damaged video, or a file that is none."""
    way = choose.randrange(4)
    if way == 0:
        content = choose.choice(PLAYLISTS).format(secret=folder.parent / "secret").encode()
    elif way == 1:
        content = (folder / "clip.mp4").read_bytes().replace(*choose.choice(BOXES))
    else:
        content = damaged((folder / "clip.mp4").read_bytes(), choose)
    stem, suffix = (
        choose.choice(("hostile", ESCAPES)),
        choose.choice(("mp4", "mp4", "mp4", "m3u8", "mkv", "webm")),
    )
    path = folder / f"{stem}.{suffix}"
    path.write_bytes(content)
    readers = (read_frames, count_frames, playable_frames, read_metadata, video_rate, video_size)
    reader = choose.choice(readers)
    acts = (command("inspect", path), lambda: reader(path))
    return Attempt(f"video {path.suffix}", choose.choice(acts))
