"""Compare Videos: two clips under one slider, played in step."""

import numpy as np

from ..refiner.estimate import check_room
from .api import CATEGORY, host, io

EITHER = [io.Image, io.Video]
PIXEL_BYTES = 16  # a colour value in memory: its float, the decoded source, and a byte


def summary(base: np.ndarray, refined: np.ndarray) -> str:
    """Describe two clips in one line: frames, and mean difference of those that both have."""
    differences = [
        np.abs(one.astype(np.int16) - other).mean()
        for one, other in zip(base, refined, strict=False)
    ]
    frames = f"{len(base)} frames"
    if len(base) != len(refined):
        frames = f"{len(base)} and {len(refined)} frames"
    return f"{frames}; mean difference {np.mean(differences):.1f} of 255"


def check_clips(sizes: dict[str, tuple[int, int, int]]) -> None:
    """Raise ValueError unless clips of these (frames, width, height) match and fit in memory."""
    shapes = [f"{name} is of {width}x{height} pixels" for name, (_, width, height) in sizes.items()]
    one, other = (size[1:] for size in sizes.values())
    if one != other or one[0] % 2 or one[1] % 2:
        raise ValueError(
            f"{' and '.join(shapes)}: give both the same even width and height, with ImageScale"
        )
    volume = sum(frames * width * height for frames, width, height in sizes.values())
    check_room(3 * PIXEL_BYTES * volume, "comparing these videos", "use shorter ones")


class CompareVideos(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerCompareVideos",
            display_name="Compare Videos",
            category=CATEGORY,
            description="Plays two clips in step under one slider, the base on its left and the"
            " refined one on its right. Saves nothing: the clips live no longer than a preview.",
            search_aliases=["before after", "video compare", "side by side", "slider"],
            inputs=[
                io.MultiType.Input(
                    "base", types=EITHER,
                    tooltip="Left of the slider: images or a video.",
                ),
                io.MultiType.Input(
                    "refined", types=EITHER,
                    tooltip="Right of the slider: images or a video of the same size.",
                ),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=120.0, step=1.0,
                    tooltip="Frames per second of images; a video has its own.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, base, refined, fps: float) -> io.NodeOutput:
        check_clips({"base": host.clip_size(base), "refined": host.clip_size(refined)})
        base_frames, rate = host.clip_frames(base, fps)
        refined_frames, _ = host.clip_frames(refined, fps)
        text = summary(base_frames, refined_frames)
        return io.NodeOutput(ui=host.show_pair(base_frames, refined_frames, rate, text))
