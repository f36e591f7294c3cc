"""Stand-ins for the nodes of ComfyUI that a workflow may use without it, with the same inputs."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from ...refiner.estimate import check_room
from ...refiner.pictures import write_png
from ...refiner.reading import check_regular
from ...refiner.video import VideoWriter, as_bytes
from ...refiner.wan.vae import WanVAE
from ..paths import SHOWN
from ..run import video_latents
from . import schema as io
from . import standalone as host
from .standalone import Clip, VideoFile

MOST_PIXELS = 1 << 25  # of a picture's frame
# Pillow's names of formats; its other readers may run programs or open other files.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
IMAGE_BYTES = 3 * 4 + 4  # a pixel of an IMAGE and of its MASK
FRAME_BYTES = 3 * 4  # a pixel of an IMAGE
COLORS = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
}
SCALINGS = ("nearest-exact", "bilinear", "area", "bicubic")


def margin(side: int, target: float) -> int:
    """Pixels to crop at both ends of a side to reach about `target`, leaving at least one."""
    return min((side - 1) // 2, max(0, round((side - target) / 2)))


def load_picture(path: Path, name: str) -> tuple[Tensor, Tensor]:
    """Read an upright IMAGE [F, H, W, 3] and its MASK 1 - alpha, as ComfyUI's LoadImage does.

    Leaves out frames whose size is not that of the first. Without alpha the mask is 64x64 zeros.
    ValueError for a file that is no picture, or too large, which is checked before decoding.
    """
    check_regular(path)
    images, masks = [], []
    try:
        with Image.open(path, formats=PICTURES) as picture:
            check_picture(picture, getattr(picture, "n_frames", 1), name)
            for frame in ImageSequence.Iterator(picture):
                check_picture(frame, len(images) + 1, name)  # a later page of a .tiff may be larger
                upright = ImageOps.exif_transpose(frame)
                if images and upright.size != (images[0].shape[1], images[0].shape[0]):
                    continue
                images.append(rgb_levels(upright))
                masks.append(mask_of(upright))
    except (MemoryError, TooLarge):
        raise
    except Image.DecompressionBombError as error:  # Pillow's limit is higher than MOST_PIXELS
        raise ValueError(
            f"image {name[:SHOWN]!r} has more than {MOST_PIXELS} pixels: scale it down first"
        ) from error
    except Exception as error:  # a damaged picture can make its decoder raise anything
        raise ValueError(
            f"image {name[:SHOWN]!r} is not a readable picture: give a .png, .jpg or .webp"
        ) from error
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))


class TooLarge(ValueError):
    """A picture has too many pixels."""


def check_picture(frame: Image.Image, frames: int, name: str) -> None:
    """Raise TooLarge for a frame of too many pixels, or too many frames for the memory."""
    shown, pixels = f"image {name[:SHOWN]!r}", frame.width * frame.height
    if pixels > MOST_PIXELS:
        raise TooLarge(
            f"{shown} has {frame.width}x{frame.height} pixels, more than {MOST_PIXELS}: scale it"
            " down first"
        )
    try:
        check_room(2 * IMAGE_BYTES * pixels * frames, f"reading {shown}", "scale it down first")
    except ValueError as error:
        raise TooLarge(str(error)) from error


def rgb_levels(picture: Image.Image) -> np.ndarray:
    """Convert a picture to [H, W, 3] in [0, 1], fp32, with all bits of a 16-bit picture."""
    if picture.mode.startswith("I"):
        grey = np.asarray(picture, dtype=np.float32) / 65535
        return np.repeat(grey.clip(0, 1)[..., None], 3, axis=-1)
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


def mask_of(picture: Image.Image) -> np.ndarray:
    """1 - alpha as [H, W], fp32; 64x64 zeros without alpha."""
    if not picture.has_transparency_data:
        return np.zeros((64, 64), np.float32)
    return 1 - np.asarray(picture.convert("RGBA").getchannel("A"), dtype=np.float32) / 255


class CLIPTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.String.Input("text"), io.Clip.Input("clip")]
        return io.Schema("CLIPTextEncode", inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, text: str, clip: Clip) -> io.NodeOutput:
        return io.NodeOutput([[clip.context(text), {}]])


class CLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = io.Combo.Input("clip_name", options=host.list_files("text_encoders"))
        inputs = [
            files,
            io.Combo.Input("type", options=("wan",)),
            io.String.Input("device", optional=True),
        ]
        return io.Schema("CLIPLoader", inputs=inputs, outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls, clip_name: str, type: str, device: str = "default") -> io.NodeOutput:
        return io.NodeOutput(host.load_clip(host.find_file("text_encoders", clip_name)))


class VAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Combo.Input("vae_name", options=host.list_files("vae"))]
        return io.Schema("VAELoader", inputs=inputs, outputs=[io.Vae.Output()])

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(host.load_vae(host.find_file("vae", vae_name)))


class LoadImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        outputs = [io.Image.Output(), io.Mask.Output()]
        return io.Schema("LoadImage", inputs=[io.String.Input("image")], outputs=outputs)

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        return io.NodeOutput(*load_picture(host.input_path(image), image))


class ImageScale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Image.Input("image"),
            io.Combo.Input("upscale_method", options=SCALINGS),
            io.Int.Input("width", min=1, max=16384),
            io.Int.Input("height", min=1, max=16384),
            io.Combo.Input("crop", options=("disabled", "center")),
        ]
        return io.Schema("ImageScale", inputs=inputs, outputs=[io.Image.Output()])

    @classmethod
    def execute(
        cls, image: Tensor, upscale_method: str, width: int, height: int, crop: str
    ) -> io.NodeOutput:
        pixels = image.movedim(-1, 1)
        if crop == "center":
            old_height, old_width = pixels.shape[2:]
            left = margin(old_width, old_height * width / height)
            top = margin(old_height, old_width * height / width)
            pixels = pixels[:, :, top : old_height - top, left : old_width - left]
        nbytes = 2 * FRAME_BYTES * len(image) * width * height
        check_room(nbytes, "this image", "scale it to fewer pixels")
        scaled = F.interpolate(pixels, size=(height, width), mode=upscale_method)
        return io.NodeOutput(scaled.movedim(1, -1))


class ImageStitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Image.Input("image1"),
            io.Combo.Input("direction", options=("right", "down", "left", "up")),
            io.Boolean.Input("match_image_size", default=True),
            io.Int.Input("spacing_width", min=0, max=1024),
            io.Combo.Input("spacing_color", options=tuple(COLORS)),
            io.Image.Input("image2", optional=True),
        ]
        return io.Schema("ImageStitch", inputs=inputs, outputs=[io.Image.Output()])

    @classmethod
    def execute(
        cls,
        image1: Tensor,
        direction: str,
        match_image_size: bool,
        spacing_width: int,
        spacing_color: str,
        image2: Tensor | None = None,
    ) -> io.NodeOutput:
        if image2 is None:
            return io.NodeOutput(image1)
        dim, shared = (2, 1) if direction in ("right", "left") else (1, 2)
        if image1.shape[shared] != image2.shape[shared]:
            sizes = " and ".join(f"{image.shape[2]}x{image.shape[1]}" for image in (image1, image2))
            raise ValueError(
                f"images of {sizes} pixels to stitch {direction}: without ComfyUI both must be of"
                f" one {'height' if shared == 1 else 'width'}, use ImageScale"
            )
        count = max(len(image1), len(image2))
        length = image1.shape[dim] + image2.shape[dim] + spacing_width
        nbytes = 2 * FRAME_BYTES * count * length * image1.shape[shared]
        check_room(nbytes, "the stitched image", "use shorter or smaller ones")
        one, other = padded(image1, count), padded(image2, count)
        size = list(one.shape)
        size[dim] = spacing_width
        spacing = torch.tensor(COLORS[spacing_color]).to(image1).expand(size)
        order = (one, spacing, other) if direction in ("right", "down") else (other, spacing, one)
        return io.NodeOutput(torch.cat(order, dim=dim))


def padded(image: Tensor, count: int) -> Tensor:
    """Repeat the last frame of an IMAGE until it has `count` frames."""
    return torch.cat((image, image[-1:].expand(count - len(image), -1, -1, -1)))


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Image.Input("pixels"), io.Vae.Input("vae")]
        return io.Schema("VAEEncode", inputs=inputs, outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, pixels: Tensor, vae: WanVAE) -> io.NodeOutput:
        nbytes = 2 * FRAME_BYTES * pixels[..., 0].numel()
        check_room(nbytes, "encoding these images", "use fewer or smaller ones")
        return io.NodeOutput({"samples": host.encode(vae, pixels)})


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Latent.Input("samples"), io.Vae.Input("vae")]
        return io.Schema("VAEDecode", inputs=inputs, outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, samples: dict, vae: WanVAE) -> io.NodeOutput:
        latents = video_latents(samples, "samples")
        batch, _, frames, height, width = latents.shape
        nbytes = 2 * FRAME_BYTES * batch * (4 * frames - 3) * 64 * height * width
        check_room(nbytes, "decoding this clip into images", "use VAE Decode Chunks to Video")
        clips = latents.split(1)
        pieces = [piece for clip in clips for piece in host.decode(vae, clip)]
        return io.NodeOutput(torch.cat(pieces))


class CreateVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Image.Input("images"), io.Float.Input("fps", default=30.0, min=1, max=120)]
        return io.Schema("CreateVideo", inputs=inputs, outputs=[io.Video.Output()])

    @classmethod
    def execute(cls, images: Tensor, fps: float) -> io.NodeOutput:
        return io.NodeOutput(VideoFile(fps, images))


class SaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Video.Input("video"),
            io.String.Input("filename_prefix", default="video/ComfyUI"),
            io.Combo.Input("format", options=("auto", "mp4"), default="auto"),
            io.Combo.Input("codec", options=("auto", "h264"), default="auto"),
        ]
        return io.Schema(
            "SaveVideo", inputs=inputs, outputs=[io.Video.Output()], is_output_node=True
        )

    @classmethod
    def execute(
        cls, video: VideoFile, filename_prefix: str, format: str, codec: str
    ) -> io.NodeOutput:
        frames, fps = host.clip_frames(video, video.fps)
        path = host.output_path(filename_prefix, ".mp4", frames.shape[2], frames.shape[1])
        with VideoWriter(
            path, frames.shape[2], frames.shape[1], fps, host.graph_metadata()
        ) as writer:
            writer.write(frames)
        return io.NodeOutput(video, ui=path)


class SaveAnimatedWEBP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Image.Input("images"),
            io.String.Input("filename_prefix", default="ComfyUI"),
            io.Float.Input("fps", default=6.0, min=0.01, max=1000),
            io.Boolean.Input("lossless", default=True),
            io.Int.Input("quality", default=80, min=0, max=100),
            io.Combo.Input("method", options=("default", "fastest", "slowest"), default="default"),
        ]
        return io.Schema("SaveAnimatedWEBP", inputs=inputs, is_output_node=True)

    @classmethod
    def execute(
        cls,
        images: Tensor,
        filename_prefix: str,
        fps: float,
        lossless: bool,
        quality: int,
        method: str,
    ) -> io.NodeOutput:
        path = host.output_path(filename_prefix, ".webp", images.shape[2], images.shape[1])
        effort = {"fastest": 0, "slowest": 6, "default": 4}[method]
        options = {
            "lossless": str(int(lossless)),
            "quality": str(quality),
            "compression_level": str(effort),
            "loop": "0",
        }
        temporary = path.with_name(f".{path.name}.partial")
        try:
            write_webp(images, temporary, fps, options)
            os.replace(temporary, path)
        except av.FFmpegError as error:
            height, width = images.shape[1:3]
            raise ValueError(
                f"{path.name} of {width}x{height} pixels cannot be written ({error.strerror}): use"
                " SaveVideo"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return io.NodeOutput(ui=path)


def write_webp(images: Tensor, path: Path, fps: float, options: dict[str, str]) -> None:
    """Write an IMAGE as a looping animation."""
    with av.open(str(path), "w", format="webp", options={"loop": "0"}) as container:
        stream = container.add_stream(
            "libwebp_anim", rate=Fraction(fps).limit_denominator(1000), options=options
        )
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "bgra" if options["lossless"] == "1" else "yuv420p"
        for image in images.split(1):
            frame = av.VideoFrame.from_ndarray(as_bytes(image)[0], format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class SaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Image.Input("images"), io.String.Input("filename_prefix", default="ComfyUI")]
        return io.Schema("SaveImage", inputs=inputs, is_output_node=True)

    @classmethod
    def execute(cls, images: Tensor, filename_prefix: str) -> io.NodeOutput:
        paths = []
        for pixels in as_bytes(images):
            paths.append(
                host.output_path(filename_prefix, ".png", images.shape[2], images.shape[1])
            )
            write_png(pixels, paths[-1])
        return io.NodeOutput(ui=paths)


CORE_NODES = (
    CLIPTextEncode,
    CLIPLoader,
    VAELoader,
    LoadImage,
    ImageScale,
    ImageStitch,
    VAEEncode,
    VAEDecode,
    CreateVideo,
    SaveVideo,
    SaveAnimatedWEBP,
    SaveImage,
)
