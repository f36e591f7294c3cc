"""Pathwise Refined Sampler: sample a clip chunk by chunk."""

from typing import Any

from ..refiner.recipe import parse_recipe
from .api import CATEGORY, host, io
from .cache import ReflectiveCacheType
from .chunk_schedule import ChunkScheduleType
from .knobs import check_knobs, method_inputs, method_text, noise_inputs, noise_text
from .options import FALLBACK
from .refiner import RefinerType
from .run import LONGEST, WHITE, check_length, check_memory, size_note, summary
from .sampler_plan import SamplerInputs
from .scenes import placed_scenes, scenes_text, sections_of
from .search import CANDIDATES, METHODS, search_inputs, search_of

WIDEST = 8192  # pixels of a side
START_LEVEL = 750
ALIASES = [
    "self forcing", "causal", "autoregressive", "ar video", "wan", "long video", "extend",
    "continue video", "text to video", "t2v", "image to video", "i2v", "video to video", "v2v",
    "reroll", "live preview", "causvid", "longlive", "krea",
]  # fmt: skip


def options_of_run(schedule: str) -> list:
    """Optional inputs that both samplers have; `schedule` is the tooltip of chunk_schedule."""
    return [
        io.MultiType.Input(
            "start", types=[io.Latent, io.Image], optional=True,
            tooltip="What to continue: clean latents of whole chunks, an image, or 1 + 4n frames of"
            " a video; images need vae. Without it, the start image that ARVideoI2V put on the"
            " MODEL.",
        ),
        RefinerType.Input(
            "refiner", optional=True,
            tooltip="Refines the noise between levels; without one, the base model runs alone.",
        ),
        ChunkScheduleType.Input("chunk_schedule", optional=True, tooltip=schedule),
        ReflectiveCacheType.Input(
            "reflective_cache", optional=True,
            tooltip="Window of memory, and what a refiner sees of it.",
        ),
        *search_inputs(),
        *method_inputs(),
    ]  # fmt: skip


def recipe_input() -> Any:
    """Return the last input of both samplers."""
    return io.String.Input(
        "recipe", default="", optional=True,
        tooltip="What you chose on the strip below: reroll 3 draws chunk 3 and later ones again"
        " (reroll 3 2: twice), keep 4 ends the clip after chunk 4, extend 2 adds two chunks; with ;"
        " between. Empty: the clip as its seed gives it.",
    )  # fmt: skip


class PathwiseRefinedSampler(io.ComfyNode):
    HAS_INTERMEDIATE_OUTPUT = True  # its text is in the history also where it is cached

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerSampler",
            display_name="Pathwise Refined Sampler",
            category=CATEGORY,
            description="Samples a video chunk by chunk; each chunk is finished before the next one"
            " starts.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load AR-VDM, with its preset. Other models get Self-Forcing's.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, or a Prompt Timeline. These models take no negative"
                    " prompt (cfg 1).",
                ),
                io.Int.Input(
                    "width", default=832, min=16, max=WIDEST, step=16,
                    tooltip="Pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=WIDEST, step=16,
                    tooltip="Pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "length", default=81, min=1, max=LONGEST, step=4,
                    tooltip="Pixel frames of the whole clip, start included: 1 + 4n. 81 frames are"
                    " 5 s at 16 fps.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64,
                    tooltip="Videos sampled together, each from its own noise.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=(1 << 63) - 1, control_after_generate=True,
                    tooltip="The same seed gives the same noise on any device, at any batch size"
                    " and length.",
                ),
                io.Combo.Input(
                    "method", options=list(METHODS), default="self-forcing",
                    tooltip="self-forcing: fresh noise between levels, as the models are trained."
                    " The help page describes the others; a search needs Search by Reward.",
                ),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="An empty latent whose size, length and batch are used instead of the"
                    " widgets.",
                ),
                *options_of_run(schedule="Levels and chunks of your own."),
                *noise_inputs(),
                io.MultiType.Input(
                    "start_video", types=[io.Image, io.Video], optional=True,
                    tooltip="Video to video: every chunk starts from these frames under the noise"
                    " of start_level, instead of from noise alone. Needs vae, and as many frames as"
                    " the clip.",
                ),
                io.Int.Input(
                    "start_level", default=START_LEVEL, min=1, max=1000, optional=True,
                    tooltip="A level of the model's (1000, 750, 500 or 250 for most), with"
                    " start_video: the lower, the closer to the video.",
                ),
                recipe_input(),
            ],
            outputs=[
                io.Latent.Output(
                    tooltip="The whole clip, start included, for VAE Decode or VAE Decode Chunks.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, length: int | None = None, method: str | None = None,
        method_settings: str | None = None, noise: str | None = None,
        noise_settings: str | None = None, recipe: str | None = None,
    ) -> bool | str:  # fmt: skip
        """Check what is given; a linked widget is None, and checked when its value is known."""
        try:
            if length is not None:
                check_length(length)
            check_knobs(method, method_settings, noise, noise_settings)
            parse_recipe(recipe or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> int:
        """Change with every early stop, so that ComfyUI does not cache an unfinished clip."""
        return host.stops(cls.hidden.unique_id)

    @classmethod
    def execute(
        cls, model, positive, width: int, height: int, length: int, batch_size: int, seed: int,
        method: str, latent=None, start=None, refiner=None, chunk_schedule=None,
        reflective_cache=None, search=None, reward=None, vae=None, prompt: str = "",
        candidates: int = CANDIDATES, method_settings: str = "", noise: str = WHITE,
        noise_settings: str = "", recipe: str = "", start_video=None,
        start_level: int = START_LEVEL,
    ) -> io.NodeOutput:  # fmt: skip
        scenes = sections_of([options for _, options in positive])
        with_knobs = method_text(method, method_settings)
        search = search_of(method, search, reward, vae, prompt, candidates)
        if search and not scenes:
            search.checked_prompt()
        inputs = SamplerInputs(
            width, height, length, batch_size, seed,
            method=with_knobs,
            noise=noise_text(noise, noise_settings),
            latent=latent, start=start, refiner=refiner, schedule=chunk_schedule,
            cache=reflective_cache, search=search, vae=vae, recipe=recipe,
            start_video=start_video, start_level=start_level,
        )  # fmt: skip
        facts = host.facts(model)
        if facts.preset is None:
            host.notice(
                f"MODEL does not say how it is sampled (use Load AR-VDM): {FALLBACK}'s preset is"
                " taken"
            )
        run = host.settled(model, inputs.run(facts))
        if note := size_note(run, facts):
            host.notice(note)
        placed = placed_scenes([options for _, options in positive], run)
        check_memory(run, facts)
        lines = [summary(run, facts)] + ([scenes_text(placed)] if placed else [])
        shown = host.show("; ".join(lines))
        return io.NodeOutput({"samples": host.sample(model, positive, run, vae)}, ui=shown)
