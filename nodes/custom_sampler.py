"""Pathwise Refined Sampler (custom): chunk-by-chunk sampling inside SamplerCustomAdvanced."""

from ..refiner.recipe import parse_recipe
from .api import CATEGORY, host, io
from .guided import FRESH_NOISE, SamplerOptions
from .knobs import check_knobs, method_text
from .sampler import options_of_run, recipe_input
from .sampler_plan import objects_of
from .search import CANDIDATES, METHODS, search_of
from .starts import start_latents


class PathwiseRefinedCustomSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerCustomSampler",
            display_name="Pathwise Refined Sampler (custom)",
            category=CATEGORY,
            description="Chunk-by-chunk sampling for SamplerCustomAdvanced. Noise, levels and"
            " prompt come from NOISE, SIGMAS and GUIDER; chunk size and window from the model's"
            " preset.",
            search_aliases=["SamplerARVideo", "custom sampler", "wan", "self forcing"],
            inputs=[
                io.Combo.Input(
                    "method", options=list(METHODS), default="self-forcing",
                    tooltip="self-forcing: fresh noise between levels, as the models are trained."
                    " The help page of Pathwise Refined Sampler describes the others.",
                ),
                io.Combo.Input(
                    "fresh_noise", options=list(FRESH_NOISE), default=FRESH_NOISE[0],
                    tooltip="Noise between levels: the same on every device, or exactly the numbers"
                    " that ComfyUI's SamplerARVideo draws, to reproduce its results.",
                ),
                *options_of_run(schedule="Chunk size; levels that contradict SIGMAS are an error."),
                recipe_input(),
            ],
            outputs=[
                io.Sampler.Output(tooltip="For SamplerCustomAdvanced, with a guider at cfg 1.")
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, method: str | None = None, method_settings: str | None = None,
        recipe: str | None = None,
    ) -> bool | str:  # fmt: skip
        """Check what is given; a linked widget is None, and checked when its value is known."""
        try:
            check_knobs(method, method_settings)
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
        cls, method: str, fresh_noise: str, start=None, refiner=None, chunk_schedule=None,
        reflective_cache=None, search=None, reward=None, vae=None, prompt: str = "",
        candidates: int = CANDIDATES, method_settings: str = "", recipe: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        method = method_text(method, method_settings)
        search = search_of(method, search, reward, vae, prompt, candidates)
        options = SamplerOptions(
            method, fresh_noise, chunk_schedule, reflective_cache, start_latents(start, vae),
            refiner, search, recipe, objects_of(refiner, search), vae,
        )  # fmt: skip
        return io.NodeOutput(host.make_sampler(options))
