"""Reflective Cache: window, sink and positions of memory, and the modes of a refiner's cache."""

from .api import CATEGORY, host, io
from .options import (
    HISTORY_MODES,
    MODELS_OWN,
    POSITIONS,
    X0_MODES,
    CacheOptions,
    parse_positions,
    preset_for,
)
from .run import memory_of, plan_run, video_latents

ReflectiveCacheType = io.Custom("REFLECTIVE_CACHE")
MOST_FRAMES = 4096


def summary(cache: CacheOptions, model, latent: dict | None) -> str:
    """Describe the window, and its bytes if model and size are known, in one line."""
    held = "all frames"
    if cache.window >= 0:
        held = f"{cache.window} latent frames, of them {cache.sink} sink"
    if model is None or latent is None:
        return f"{held}; connect MODEL and LATENT to see the bytes"
    facts = host.facts(model)
    batch, _, *size = video_latents(latent, "latent").shape
    window = CacheOptions(cache.window, cache.sink, cache.positions)
    plan = plan_run(preset_for(facts.preset, None, window), (batch, *size), None)
    return f"{held}: {memory_of(plan, facts).nbytes / 1e6:,.1f} MB of keys and values"


class ReflectiveCacheNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerReflectiveCache",
            display_name="Reflective Cache",
            category=CATEGORY,
            description="Limits how many earlier frames the model remembers: with a window, memory"
            " stays the same at any length. Shows the bytes for the connected model and size.",
            search_aliases=["kv cache", "window", "sink"],
            inputs=[
                io.Int.Input(
                    "window", default=-1, min=-1, max=MOST_FRAMES,
                    tooltip="Latent frames in memory: sink, past and the current chunk. -1 holds"
                    " all (Self-Forcing); LongLive uses 12 with a sink of 3.",
                ),
                io.Int.Input(
                    "sink", default=0, min=0, max=MOST_FRAMES,
                    tooltip="Latent frames at the start of the video that are never dropped. They"
                    " count in the window.",
                ),
                io.Combo.Input(
                    "positions", options=list(POSITIONS), default=MODELS_OWN, advanced=True,
                    tooltip="Temporal position of a remembered frame: its place in the video"
                    " (absolute), or in the window (relative), which stays in the training range at"
                    " any length. sink-adjacent: as absolute, with the sink right before the oldest"
                    " other frame. flex: as absolute, with slow frequencies scaled for a video of"
                    " four times the trained length.",
                ),
                io.Combo.Input(
                    "history", options=list(HISTORY_MODES), default=HISTORY_MODES[0], advanced=True,
                    tooltip="What a refiner sees of earlier chunks. Only with a REFINER.",
                ),
                io.Combo.Input(
                    "previous_x0", options=list(X0_MODES), default=X0_MODES[0], advanced=True,
                    tooltip="What a refiner sees of the chunk's previous prediction. Only with a"
                    " REFINER.",
                ),
                io.Model.Input("model", optional=True, tooltip="Only to show the bytes."),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="The size of the clip, only to show the bytes.",
                ),
            ],
            outputs=[ReflectiveCacheType.Output(display_name="REFLECTIVE_CACHE")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, positions: str | None = None) -> bool | str:
        try:
            if positions is not None:  # else it is linked
                parse_positions(positions)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, window: int, sink: int, positions: str, history: str, previous_x0: str,
        model=None, latent=None,
    ) -> io.NodeOutput:  # fmt: skip
        if window == 0 or 0 < window <= sink:
            raise ValueError(
                f"window {window} with sink {sink}: the window counts sink, past and the current"
                f" chunk, so use a window of at least {sink + 1}, or -1 for all"
            )
        cache = CacheOptions(window, sink, parse_positions(positions), history, previous_x0)
        return io.NodeOutput(cache, ui=host.show(summary(cache, model, latent)))
