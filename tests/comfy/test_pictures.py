"""The standalone host reads pictures as ComfyUI's LoadImage does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_graphs import node
from comfy_server import Server, find_comfyui
from PIL import Image

from autorefiner.nodes.hosts.core_nodes import load_picture
from autorefiner.refiner.pictures import write_png

# How a camera stores an upright picture, by EXIF orientation.
STORED = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.transpose(1, 0, 2),
    6: lambda up: np.rot90(up, 1),
    7: lambda up: np.rot90(up, 2).transpose(1, 0, 2),
    8: lambda up: np.rot90(up, -1),
}


def upright() -> np.ndarray:
    """Return a picture [24, 40, 3] whose corners differ."""
    image = np.full((24, 40, 3), 90, np.uint8)
    image[:12, :20], image[:12, 20:], image[12:, :20] = (250, 20, 20), (20, 250, 20), (20, 20, 250)
    return image


def stored(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright())))
    picture.save(path, exif=exif, quality=100, subsampling=0)
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_upright_however_it_is_stored(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    image, mask = load_picture(stored(tmp_path / f"a{suffix}", orientation), "a")
    assert image.shape == (1, 24, 40, 3)
    corners = image[0, [4, 4, 20, 20], [8, 32, 8, 32]]
    assert (
        corners * 255 - torch.tensor(upright()[[4, 4, 20, 20], [8, 32, 8, 32]])
    ).abs().max() < 12
    assert mask.shape == (1, 64, 64) and not mask.any()


def odd_pictures(folder: Path) -> dict[str, Path]:
    """Write pictures in other modes than plain RGB."""
    image = Image.fromarray(upright())
    ramp = np.linspace(0, 255, 40).astype(np.uint8)[None].repeat(24, 0)
    image.convert("L").save(folder / "grey.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    Image.fromarray(np.dstack((upright(), ramp))).save(folder / "alpha.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "deep.png")
    frames = [Image.fromarray(np.roll(upright(), 8 * step, axis=1)) for step in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(
        folder / "moving.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True
    )
    return {path.name: path for path in sorted(folder.iterdir())}


def test_other_kinds_of_pictures_are_read_as_they_look(tmp_path: Path) -> None:
    read = {name: load_picture(path, name) for name, path in odd_pictures(tmp_path).items()}
    assert {name: image.shape[0] for name, (image, _) in read.items()} == {
        "alpha.png": 1, "cmyk.jpg": 1, "deep.png": 1, "grey.png": 1, "moving.gif": 3,
        "moving.webp": 3, "palette.png": 1,
    }  # fmt: skip
    assert all(
        image.dtype == torch.float32 and image.shape[1:] == (24, 40, 3)
        for image, _ in read.values()
    )
    ramp = torch.linspace(0, 1, 40)
    assert (read["deep.png"][0][0, 0, :, 0] - ramp).abs().max() < 0.004
    assert (read["alpha.png"][1][0, 0] - (1 - ramp)).abs().max() < 0.004
    assert (read["alpha.png"][0][0, 4, 8] * 255 - torch.tensor([250, 20, 20])).abs().max() < 1
    moved = read["moving.webp"][0]
    assert torch.equal(moved[1], moved[0].roll(8, dims=1))


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png") as error:
        load_picture(tmp_path / "a.png", "a.png")
    assert "\n" not in str(error.value)


@pytest.mark.comfyui
@pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")
def test_comfyui_reads_the_same_pixels(server: Server, tmp_path: Path) -> None:
    folder = server.base / "input" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = odd_pictures(folder)
    turned = (1, 3, 6, 8)  # ComfyUI 0.27 does not mirror pictures back
    pictures |= {f"{number}.jpg": stored(folder / f"{number}.jpg", number) for number in turned}
    write_png(upright(), folder / "plain.png")
    pictures["plain.png"] = folder / "plain.png"
    for name, path in pictures.items():
        graph = {
            "1": node("LoadImage", image=f"pictures/{name}"),
            "2": node("SaveImage", images=["1", 0], filename_prefix=f"seen/{name}"),
        }
        server.run(graph)
        saved = sorted((server.base / "output" / "seen").glob(f"{name}_*.png"))
        theirs = np.stack([np.asarray(Image.open(one).convert("RGB")) for one in saved])
        ours, _ = load_picture(path, name)
        assert ours.shape == theirs.shape, name
        assert np.abs(ours.numpy() * 255 - theirs).mean() < 3, name  # CMYK to RGB is ambiguous
