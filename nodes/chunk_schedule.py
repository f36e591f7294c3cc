"""Chunk Schedule: chunk size and noise levels."""

from ..refiner.schedule import PRESETS
from .api import CATEGORY, io
from .options import MODELS_OWN, ChunkSchedule, parse_levels

ChunkScheduleType = io.Custom("CHUNK_SCHEDULE")
LEVEL_WIDGETS = ("levels", "first_levels", "refined_levels")


def read_levels(levels: str, first_levels: str, refined_levels: str) -> list[tuple[int, ...]]:
    """Parse the three widgets; ValueError that names the widget."""
    texts = zip(LEVEL_WIDGETS, (levels, first_levels, refined_levels), strict=True)
    return [parse_levels(text, name, pure_noise=name != "refined_levels") for name, text in texts]


class ChunkScheduleNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerChunkSchedule",
            display_name="Chunk Schedule",
            category=CATEGORY,
            description="Noise levels and chunk sizes: a published model's, or your own where a"
            " field is filled in.",
            search_aliases=["levels", "num_frame_per_block", "denoising steps"],
            inputs=[
                io.Combo.Input(
                    "preset", options=[MODELS_OWN, *PRESETS], default=MODELS_OWN,
                    tooltip="Start from the connected model's preset, or from another model's.",
                ),
                io.String.Input(
                    "levels", default="",
                    tooltip="Nominal levels from pure noise down, like 1000, 750, 500, 250. Empty:"
                    " the preset's.",
                ),
                io.Int.Input(
                    "frames_per_chunk", default=0, min=0, max=64,
                    tooltip="Latent frames denoised together, as the model was trained (1 or 3). 0:"
                    " the preset's.",
                ),
                io.String.Input(
                    "first_levels", default="", advanced=True,
                    tooltip="Levels of the first chunk only, where it needs more. Empty: the"
                    " preset's.",
                ),
                io.String.Input(
                    "refined_levels", default="", advanced=True,
                    tooltip="Levels whose noise a refiner refines, like 750, 500. Empty: those it"
                    " was trained on.",
                ),
            ],
            outputs=[ChunkScheduleType.Output(display_name="CHUNK_SCHEDULE")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, levels: str | None = "") -> bool | str:
        """Check `levels`; ComfyUI would report an error once for every widget named here."""
        try:  # None is a link, whose value is not known yet
            read_levels(levels or "", "", "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        preset: str,
        levels: str,
        frames_per_chunk: int,
        first_levels: str,
        refined_levels: str,
    ) -> io.NodeOutput:
        chunk_levels, first_chunk_levels, refined = read_levels(
            levels, first_levels, refined_levels
        )
        name = None if preset == MODELS_OWN else preset
        chunk = frames_per_chunk or None
        return io.NodeOutput(ChunkSchedule(name, chunk_levels, chunk, first_chunk_levels, refined))
