"""Hostile pictures, videos and file names, without ComfyUI."""

import os
import struct
import time
import zlib
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from autorefiner.nodes.hosts import core_nodes, standalone
from autorefiner.nodes.hosts.standalone import Place, input_path, output_path, running_at
from autorefiner.nodes.paths import check_inside, dated, inside
from autorefiner.nodes.refiner import new_file
from autorefiner.refiner import estimate
from autorefiner.refiner.files import open_locked, unused_path
from autorefiner.refiner.video import (
    VideoWriter,
    count_frames,
    read_frames,
    read_metadata,
    video_rate,
    video_size,
)

READERS = (count_frames, read_frames, read_metadata, video_rate, video_size)


@pytest.fixture
def base(tmp_path: Path):
    """Run at a folder with an input folder, and a secret video outside of it."""
    for name in ("input", "output", "temp", "secret"):
        (tmp_path / name).mkdir()
    with VideoWriter(tmp_path / "secret" / "secret.mp4", 16, 16, 8) as writer:
        writer.write(torch.zeros(5, 16, 16, 3, dtype=torch.uint8).numpy())
    with running_at(Place(tmp_path, tmp_path / "output")):
        yield tmp_path


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {secret}\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 26\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
    "<Period><AdaptationSet>"
    '<Representation id="a" mimeType="video/mp4"><BaseURL>{secret}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
}


@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "webm", "png"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_is_no_video_and_no_picture(kind: str, suffix: str, base: Path) -> None:
    path = base / "input" / f"cat.{suffix}"
    path.write_text(PLAYLISTS[kind].format(secret=base / "secret" / "secret.mp4"))
    for reader in READERS:
        with pytest.raises(ValueError, match="readable video"):
            reader(path)
    with pytest.raises(ValueError, match="readable picture"):
        core_nodes.LoadImage.execute(path.name)


@pytest.mark.parametrize(
    "name", ["concat:secret.mp4|secret.mp4", "file:secret.mp4", "http:x", "pipe:0", "-"]
)
def test_the_name_of_a_video_is_no_address(
    name: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base / "secret")
    with pytest.raises(ValueError, match="readable video"):
        count_frames(Path(name))
    os.rename("secret.mp4", name)
    assert count_frames(Path(name)) == 5


@pytest.mark.parametrize(
    ("box", "other"),
    [(b"avc1", b"zzzz"), (b"stsd\0\0\0\0\0\0\0\1", b"stsd\0\0\0\0\0\0\0\0")],
)
def test_a_video_that_no_codec_reads_is_one_line(box: bytes, other: bytes, base: Path) -> None:
    content = (base / "secret" / "secret.mp4").read_bytes()
    path = base / "damaged.mp4"
    path.write_bytes(content.replace(box, other))
    for reader in READERS:
        with pytest.raises(ValueError, match=r"codec|video") as error:
            reader(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing"])
def test_what_is_no_file_is_no_video(kind: str, base: Path) -> None:
    path = base / "a.mp4"
    {"pipe": os.mkfifo, "folder": os.mkdir, "nothing": lambda path: None}[kind](path)
    for reader in READERS:
        with pytest.raises(ValueError, match=r"regular|readable"):
            reader(path)


@pytest.mark.parametrize("kind", ["mov", "matroska", "webm", "avi", "gif"])
def test_videos_that_people_have_are_read(kind: str, base: Path) -> None:
    path = base / f"a.{kind}"
    codec = {"gif": "gif", "webm": "libvpx-vp9"}.get(kind, "mpeg4")
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(
            codec, rate=8, width=16, height=16, pix_fmt="rgb8" if kind == "gif" else "yuv420p"
        )
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(16, 16, stream.pix_fmt)))
        container.mux(stream.encode())
    assert read_frames(path).shape == (3, 16, 16, 3) and 8 <= video_rate(path) < 9


def test_frames_that_do_not_fit_in_memory_are_not_decoded(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = base / "secret" / "secret.mp4"
    nbytes = 2 * 3 * 5 * 16 * 16
    monkeypatch.setattr(estimate, "available_bytes", lambda device: nbytes)
    assert len(read_frames(path)) == 5
    monkeypatch.setattr(estimate, "available_bytes", lambda device: nbytes - 1)
    with pytest.raises(ValueError, match="free"):
        read_frames(path)
    assert len(read_frames(path, every=2)) == 3


def png(width: int, height: int) -> bytes:
    """Return a 1-bit PNG that claims the given size and holds almost no data."""

    def piece(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = piece(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + piece(b"IDAT", zlib.compress(bytes(9)))
        + piece(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(16_000, 16_000), (2**31 - 1, 2), (1, 2**31 - 1), (8000, 4195)])
def test_a_picture_of_too_many_pixels_is_not_decoded(size: tuple[int, int], base: Path) -> None:
    (base / "input" / "b.png").write_bytes(png(*size))
    with pytest.raises(ValueError, match="pixels"):
        core_nodes.LoadImage.execute("b.png")


def test_frames_of_a_picture_count(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 90, 200)]
    frames[0].save(base / "input" / "a.gif", save_all=True, append_images=frames[1:])
    image, _ = core_nodes.LoadImage.execute("a.gif").args
    assert image.shape == (3, 64, 64, 3)
    need = 3 * 64 * 64 * 2 * core_nodes.IMAGE_BYTES
    monkeypatch.setattr(estimate, "available_bytes", lambda device: need)
    assert len(core_nodes.LoadImage.execute("a.gif").args[0]) == 3
    monkeypatch.setattr(estimate, "available_bytes", lambda device: need - 1)
    with pytest.raises(ValueError, match="free"):
        core_nodes.LoadImage.execute("a.gif")


def test_a_later_page_that_is_too_large_is_not_decoded(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [Image.new("RGB", (side, side)) for side in (16, 64)]
    pages[0].save(base / "input" / "a.tiff", save_all=True, append_images=pages[1:])
    assert core_nodes.LoadImage.execute("a.tiff").args[0].shape == (1, 16, 16, 3)
    monkeypatch.setattr(core_nodes, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(ValueError, match="64x64"):
        core_nodes.LoadImage.execute("a.tiff")


NODES = {
    "LoadImage": lambda image: core_nodes.LoadImage.execute("a.png"),
    "ImageScale": lambda image: core_nodes.ImageScale.execute(
        image, "bilinear", 300, 300, "center"
    ),
    "ImageStitch": lambda image: core_nodes.ImageStitch.execute(
        image, "right", True, 0, "white", image
    ),
    "VAEDecode": lambda image: core_nodes.VAEDecode.execute(
        {"samples": torch.zeros(1, 16, 6, 8, 8)}, None
    ),
    "VAEEncode": lambda image: core_nodes.VAEEncode.execute(image, None),
}


@pytest.mark.parametrize("node", NODES)
def test_what_does_not_fit_in_memory_is_refused_before_it_is_made(
    node: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64)).save(base / "input" / "a.png")
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 90_000)
    with pytest.raises(ValueError, match="free"):
        NODES[node](torch.zeros(1, 64, 64, 3))


@pytest.mark.parametrize("name", ["eps", "svg", "psd", "ico", "pcx"])
def test_pictures_of_other_kinds_are_not_opened(name: str, base: Path) -> None:
    path = base / "input" / "a.png"
    if name in ("eps", "ico", "pcx"):
        Image.new("RGB", (16, 16)).save(path, format=name.upper())
    else:
        path.write_bytes(
            {"svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "psd": b"8BPS\0\1" + bytes(40)}[
                name
            ]
        )
    with pytest.raises(ValueError, match="readable"):
        core_nodes.LoadImage.execute("a.png")


def test_a_name_stays_in_its_folder_wherever_links_lead(base: Path) -> None:
    (base / "output" / "way").symlink_to(base / "secret")
    (base / "output" / "own").symlink_to(base / "output")
    (base / "output" / "gone.refiner.safetensors").symlink_to(base / "secret" / "new")
    root = base / "output"
    for name in (
        "../x",
        "way/x",
        "way",
        ".",
        "",
        "/etc/x",
        "a/../../x",
        "x\0",
        "gone.refiner.safetensors",
    ):
        with pytest.raises(ValueError, match="leaves"):
            inside(root, name, "name")
    for name in ("x", "own/x", "a/../x", "a b/ü"):
        assert inside(root, name, "name").is_relative_to(root)
    for name in ("a/" * 600, "a/" * 2000 + "x", "a" * 5000, "\ud800"):
        with pytest.raises(ValueError, match=r"shorter|name") as error:
            inside(root, name, "name")
        assert len(str(error.value)) < 300
    (base / "link").symlink_to(root)  # the folder itself may be a link
    check_inside(base / "link", base / "link" / "x", "name")
    for overwrite in (True, False):
        with pytest.raises(ValueError, match="leaves"):
            new_file(root, "way/mine", overwrite)
    with pytest.raises(ValueError, match="leaves"):
        new_file(root, "gone", overwrite=True)
    assert new_file(root, "gone", overwrite=False).name == "gone_2.refiner.safetensors"


def test_a_link_that_leads_nowhere_is_not_written_through(base: Path) -> None:
    root = base / "output"
    (root / "a_00001_.mp4").symlink_to(base / "secret" / "new")
    (root / "a_00002_.partial.mp4").symlink_to(base / "secret" / "new")
    assert unused_path(root, "a", ".mp4").name == "a_00003_.mp4"
    with pytest.raises(OSError, match="link"):
        open_locked(root / "a_00002_.partial.mp4", "wait")
    assert not (base / "secret" / "new").exists()


@pytest.mark.parametrize("depth", [50, 600, 1000, 2000])
def test_a_prefix_of_many_folders_is_one_line(depth: int, base: Path) -> None:
    with pytest.raises(ValueError, match="shorter") as error:
        output_path("a/" * depth + "x", ".png")
    assert len(str(error.value)) < 300 and not list((base / "output").iterdir())


NOW = time.struct_time((2026, 3, 7, 9, 5, 2, 5, 66, 0))


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("a/%year%-%month%-%day%/%hour%%minute%%second%", "a/2026-03-07/090502"),
        ("%width%x%height%", "64x48"),
        ("%date:yyyy-MM-dd%/%date:hhmmss%", "2026-03-07/090502"),
        ("%date:yy M d h m s%", "26 3 7 9 5 2"),
        ("%date:yyyyMMdd_x%", "20260307_x"),
        ("%Sampler.seed%_%years%_100%_%", "%Sampler.seed%_%years%_100%_%"),
        ("", ""),
    ],
)
def test_a_prefix_is_dated_as_comfyui_dates_it(prefix: str, expected: str) -> None:
    assert dated(prefix, 64, 48, NOW) == expected


def test_tokens_of_a_prefix_are_said_in_the_files_name(base: Path) -> None:
    core_nodes.SaveImage.execute(torch.zeros(1, 16, 32, 3), "%year%/%width%x%height%")
    assert (base / "output" / time.strftime("%Y") / "32x16_00001_.png").exists()


def test_a_name_may_say_its_folder(base: Path) -> None:
    for folder in ("input", "output", "temp"):
        (base / folder / "a.png").write_text(folder)
        (base / folder / "b [old].png").write_text(folder)
        assert input_path(f"a.png [{folder}]").read_text() == folder
        assert input_path(f"b [old].png [{folder}]").read_text() == folder
    assert input_path("a.png").read_text() == "input"
    assert input_path("b [old].png").read_text() == "input"
    for name in (
        "../secret/secret.mp4 [output]",
        "a.png [secret]",
        " [input]",
        "[input]",
        "x.png [output]",
    ):
        with pytest.raises(ValueError, match=r"leaves|is not in"):
            input_path(name)


def test_a_notice_does_not_steer_the_terminal(capsys: pytest.CaptureFixture) -> None:
    standalone.notice("\x1b[2Jx\ny")
    assert capsys.readouterr().err == "autorefiner: \\x1b[2Jx\\ny\n"
