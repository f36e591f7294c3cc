"""Prompt Timeline: a prompt for each section of a video."""

from ..refiner.prompt_timeline import format_sections, parse_timeline
from .api import CATEGORY, host, io
from .scenes import conditioning_of

EXAMPLE = """0s a red star circles on a navy ground
5s a green box rests on a gray ground
8s flush 1: a blue ring swings on a gray ground"""


class PromptTimeline(io.ComfyNode):
    HAS_INTERMEDIATE_OUTPUT = True  # its text is in the history also where it is cached

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerPromptTimeline",
            display_name="Prompt Timeline",
            category=CATEGORY,
            description="A prompt for each section of a video, which the samplers of this pack take"
            " as positive: each section starts with a chunk.",
            search_aliases=[
                "prompt schedule", "prompt travel", "scenes", "storyboard", "multi prompt",
                "long video",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder, as for CLIP Text Encode."),
                io.String.Input(
                    "text", multiline=True, default=EXAMPLE,
                    tooltip="A section a line: TIME [#] [TRANSITION:] PROMPT. TIME is 5s, 00:05 or"
                    " f80, of the whole video at 16 fps. TRANSITION is keep, recache 12, flush 1 or"
                    " cut (relative positions); # is cut and flush 1. Or equal parts in one line:"
                    " PROMPT | PROMPT.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    tooltip="For positive of Pathwise Refined Sampler, or for a BasicGuider with"
                    " Pathwise Refined Sampler (custom).",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        try:
            if text is not None:  # a link is checked when its value is known
                parse_timeline(text)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, clip, text: str) -> io.NodeOutput:
        sections = parse_timeline(text)
        conditioning = conditioning_of(sections, lambda prompt: host.encode_prompt(clip, prompt))
        lines = "; ".join(format_sections(sections).splitlines())
        return io.NodeOutput(conditioning, ui=host.show(f"{len(sections)} scenes: {lines}"))
