"""VAE Decode Chunks: decode a few frames at a time, to images or straight to a file."""

import torch

from ..refiner.estimate import check_room
from ..refiner.video import VideoWriter, as_bytes, check_pixels
from .api import CATEGORY, host, io
from .run import video_latents

WAN_VAE = "Wan2.1's VAE, or the demo's. For another kind use VAE Decode."


class DecodeChunks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerDecodeChunks",
            display_name="VAE Decode Chunks",
            category=CATEGORY,
            description="Decodes a video a few frames at a time: the pixels of VAE Decode, but the"
            " decoder needs memory for a few frames instead of the whole clip.",
            search_aliases=["vae decode", "streaming decode", "wan vae", "long video"],
            inputs=[
                io.Latent.Input("samples", tooltip="The clip to decode."),
                io.Vae.Input("vae", tooltip=WAN_VAE),
            ],
            outputs=[
                io.Image.Output(tooltip="All frames; the clips of a batch follow each other.")
            ],
        )

    @classmethod
    def execute(cls, samples: dict, vae) -> io.NodeOutput:
        latents = video_latents(samples, "samples")
        batch, _, frames, height, width = latents.shape
        pixel_frames = batch * (4 * frames - 3)
        nbytes = pixel_frames * 64 * height * width * 3 * 4
        check_room(nbytes, "decoding this clip into images", "use VAE Decode Chunks to Video")
        images = torch.empty(pixel_frames, 8 * height, 8 * width, 3)
        done = 0
        for clip in latents.split(1):
            for pixels in host.decode(vae, clip):
                check_pixels(pixels)
                images[done : done + len(pixels)] = pixels
                done += len(pixels)
        return io.NodeOutput(images)


class DecodeToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerDecodeToVideo",
            display_name="VAE Decode Chunks to Video",
            category=CATEGORY,
            description="Decodes straight into an .mp4 in the output folder, so that not even the"
            " images of a long video must fit in memory. If stopped, it leaves the finished frames"
            " in NAME.partial.mp4. The file holds the workflow: drop it on the page to load it.",
            search_aliases=["vae decode", "save video", "streaming decode", "wan vae"],
            inputs=[
                io.Latent.Input("samples", tooltip="The clip to decode, a single video."),
                io.Vae.Input("vae", tooltip=WAN_VAE),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=120.0, step=1.0,
                    tooltip="Frames per second; Wan2.1 models generate 16.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/AutoRefiner",
                    tooltip="Subfolder and start of the file's name, inside the output folder.",
                ),
            ],
            outputs=[io.Video.Output(tooltip="The file, for nodes that take a VIDEO.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, samples: dict, vae, fps: float, filename_prefix: str) -> io.NodeOutput:
        latents = video_latents(samples, "samples")
        if len(latents) > 1:
            raise ValueError(
                f"samples hold {len(latents)} videos and a file takes one: use LatentFromBatch"
                " before it"
            )
        height, width = (8 * side for side in latents.shape[3:])
        path = host.output_path(filename_prefix, ".mp4", width, height)
        with VideoWriter(path, width, height, fps, host.graph_metadata(cls.hidden)) as writer:
            for pixels in host.decode(vae, latents):
                writer.write(as_bytes(pixels))
        return io.NodeOutput(host.video_file(path), ui=host.show_video(path))
