"""Pathwise Refined Sampler: sample a clip chunk by chunk."""

from ..refiner.schedule import latent_frames
from .api import CATEGORY, host, io
from .cache import ReflectiveCacheType
from .chunk_schedule import ChunkScheduleType
from .knobs import check_knobs, method_inputs, method_text, noise_inputs, noise_source, noise_text
from .options import FALLBACK, preset_for
from .refiner import RefinerType
from .refiner_plan import plan_refiner
from .run import WHITE, Run, begun_from, check_memory, clip_shape, plan_run, start_of, summary
from .scenes import placed_scenes, scenes_text, sections_of
from .search import CANDIDATES, METHODS, search_inputs, search_of

LONGEST, WIDEST = 16381, 8192  # pixel frames; pixels of a side


def options_of_run(schedule: str) -> list:
    """Optional inputs that both samplers have; `schedule` is the tooltip of chunk_schedule."""
    return [
        io.Latent.Input(
            "start", optional=True,
            tooltip="Clean latents to continue from: an encoded image (1 frame), or a clip of whole"
            " chunks. Without it, the start image that ARVideoI2V put on the MODEL.",
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


def check_length(length: int) -> None:
    """Raise ValueError for pixel frames that no clip has."""
    if not 1 <= length <= LONGEST:
        raise ValueError(f"length {length}: a clip has 1 to {LONGEST} pixel frames")
    latent_frames(length)


class PathwiseRefinedSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerSampler",
            display_name="Pathwise Refined Sampler",
            category=CATEGORY,
            description="Samples a video chunk by chunk; each chunk is finished before the next one"
            " starts.",
            search_aliases=["self forcing", "causal", "autoregressive", "ar video"],
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
                    " The help page describes the others.",
                ),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="An empty latent whose size, length and batch are used instead of the"
                    " widgets.",
                ),
                *options_of_run(schedule="Levels and chunks of your own."),
                *noise_inputs(),
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
        noise_settings: str | None = None,
    ) -> bool | str:  # fmt: skip
        """Check what is given; a linked widget is None, and checked when its value is known."""
        try:
            if length is not None:
                check_length(length)
            check_knobs(method, method_settings, noise, noise_settings)
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
        reflective_cache=None, reward=None, vae=None, prompt: str = "",
        candidates: int = CANDIDATES, method_settings: str = "", noise: str = WHITE,
        noise_settings: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        method, noise = method_text(method, method_settings), noise_text(noise, noise_settings)
        scenes = sections_of([options for _, options in positive])
        text = scenes[0].prompt if scenes else prompt
        search = search_of(method, reward, vae, text, candidates)
        if latent is None:
            check_length(length)
        facts = host.facts(model)
        if facts.preset is None:
            host.notice(
                f"MODEL does not say how it is sampled (use Load AR-VDM): {FALLBACK}'s preset is"
                " taken"
            )
        preset = preset_for(facts.preset, chunk_schedule, reflective_cache, refiner is not None)
        refined = plan_refiner(
            refiner, facts.config, facts.dtype, preset.all_levels, chunk_schedule, reflective_cache
        )
        shape = clip_shape(latent, width, height, length, batch_size)
        initial = begun_from(start_of(start, facts), shape)
        plan = plan_run(preset, shape, initial, reflective_cache)
        source = noise_source(noise, seed, preset.chunk)
        run = Run(plan, seed, method, initial, source, refined, search, noise)
        run = host.settled(model, run)
        placed = placed_scenes([options for _, options in positive], run)
        check_memory(run, facts)
        lines = [summary(run, facts)] + ([scenes_text(placed)] if placed else [])
        shown = host.show("; ".join(lines))
        return io.NodeOutput({"samples": host.sample(model, positive, run)}, ui=shown)
