"""Reflective Cache: window, sink, positions and policy of memory, and a refiner's view of it."""

from dataclasses import replace

from ..refiner.memory.policies import POLICIES
from ..refiner.memory.policy import Policy
from ..refiner.memory.stores import STORES, get_store
from .api import CATEGORY, host, io
from .options import (
    AS_TRAINED,
    HEADS,
    HISTORY_MODES,
    MEMORIES,
    MODELS_OWN,
    POSITIONS,
    X0_MODES,
    CacheOptions,
    check_settings,
    memory_text,
    parse_policy,
    parse_positions,
    preset_for,
)
from .paths import inside
from .run import bytes_text, memory_of, plan_run, video_latents

ReflectiveCacheType = io.Custom("REFLECTIVE_CACHE")
MOST_FRAMES = 4096
PLAIN = "plain"  # the store of workflows that name none


def chosen_policy(memory: str, settings: str) -> Policy | None:
    """Return the memory policy of the widgets, None for the model's; a file is in models/heads.

    Raises ValueError for knobs that the policy lacks, and for a file elsewhere.
    """
    check_settings(settings, "memory_settings")
    located = []
    for setting in settings.split(","):
        knob, _, value = (part.strip() for part in setting.partition("="))
        is_file = knob == HEADS and value
        path = inside(host.model_folder(HEADS), value, HEADS) if is_file else None
        located.append(f"{HEADS}={path}" if path else setting)
    return parse_policy(memory, ",".join(located))


def summary(cache: CacheOptions, model, latent: dict | None) -> str:
    """Describe the window, and its bytes if model and size are known, in one line."""
    window, sink = cache.held
    held = "all frames" if window < 0 else f"{window} latent frames, of them {sink} sink"
    held += memory_text(cache.policy, cache.store)
    if model is None or latent is None:
        return held
    facts = host.facts(model)
    batch, _, *size = video_latents(latent, "latent").shape
    base = replace(cache, history=AS_TRAINED, previous_x0=AS_TRAINED)
    plan = plan_run(preset_for(facts.preset, None, base), (batch, *size), None, base)
    return f"{held}: {bytes_text(*memory_of(plan, facts).bytes_on(facts.device))}"


class ReflectiveCacheNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerReflectiveCache",
            display_name="Reflective Cache",
            category=CATEGORY,
            description="Chooses which earlier frames the model remembers and reads: with a window,"
            " memory stays the same at any length. Shows the bytes for the connected model and"
            " size.",
            search_aliases=["kv cache", "memory policy", "sink", "long video", *POLICIES],
            inputs=[
                io.Int.Input(
                    "window", default=-1, min=-1, max=MOST_FRAMES,
                    tooltip="Latent frames in memory: sink, past and the current chunk. -1 holds"
                    " all (Self-Forcing), or what the memory policy suggests; LongLive uses 12 with"
                    " a sink of 3.",
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
                io.Combo.Input(
                    "memory", options=list(MEMORIES), default=MODELS_OWN, optional=True,
                    tooltip="Which of the held frames a chunk reads; the help page describes each."
                    " window, that of most models, reads all. At window -1 and the model's"
                    " positions, a policy that needs others brings its window, sink and positions.",
                ),
                io.String.Input(
                    "memory_settings", default="", optional=True,
                    tooltip="The policy's knobs, like k=4,recent=3 for top-frames. Empty: its"
                    " defaults.",
                ),
                io.String.Input(
                    "positions_settings", default="", optional=True, advanced=True,
                    tooltip="Knobs of the positions, like scale=0.5 for flex. Empty: their"
                    " defaults.",
                ),
                io.Combo.Input(
                    "store", options=list(STORES), default=PLAIN, optional=True, advanced=True,
                    tooltip="How keys and values lie in memory: as they are (plain), in about half"
                    " the bytes (int8), or in the host's memory, from which each layer is copied"
                    " ahead (offload).",
                ),
            ],
            outputs=[ReflectiveCacheType.Output(display_name="REFLECTIVE_CACHE")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, positions: str | None = None, memory: str | None = None,
        memory_settings: str | None = None, positions_settings: str | None = None,
    ) -> bool | str:  # fmt: skip
        """Check what is given; a linked widget is None, and checked when its value is known."""
        try:
            if positions is not None:
                parse_positions(positions, positions_settings or "")
            if memory is not None:
                chosen_policy(memory, memory_settings or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, window: int, sink: int, positions: str, history: str, previous_x0: str,
        model=None, latent=None, memory: str = MODELS_OWN, memory_settings: str = "",
        positions_settings: str = "", store: str = PLAIN,
    ) -> io.NodeOutput:  # fmt: skip
        if window == 0 or 0 < window <= sink:
            raise ValueError(
                f"window {window} with sink {sink}: the window counts sink, past and the current"
                f" chunk, so use a window of at least {sink + 1}, or -1 for all"
            )
        cache = CacheOptions(
            window,
            sink,
            parse_positions(positions, positions_settings),
            history,
            previous_x0,
            chosen_policy(memory, memory_settings),
            get_store(store),
        )
        return io.NodeOutput(cache, ui=host.show(summary(cache, model, latent)))
