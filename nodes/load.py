"""Load AR-VDM and Load AR-VDM Demo."""

from pathlib import Path

from ..refiner.schedule import PRESETS, get_preset
from ..refiner.wan.checkpoint import CheckpointInfo, inspect, require_transformer
from .api import CATEGORY, host, io

AUTO = "auto"
DTYPES = (AUTO, "bf16", "fp16", "fp32", "fp8_e4m3fn")


def choose_preset(choice: str, info: CheckpointInfo) -> str:
    """Return the preset's name: the choice, or what the file proves.

    Raises ValueError, which names the likely presets, where the file proves none.
    """
    if choice != AUTO:
        return choice
    require_transformer(info)
    if info.preset is None:
        reason = info.preset_reason.replace("pass --preset", "set the widget preset to")
        raise ValueError(f"preset of {info.path.name}: {reason}")
    get_preset(info.preset)
    return info.preset


def stamped(path: Path | None, **inputs: object) -> tuple:
    """Return a cache key of a loader's inputs and its file's modification time."""
    modified = path.stat().st_mtime_ns if path and path.exists() else 0
    return (modified, *sorted(map(str, inputs.items())))


class LoadARVDM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerLoadARVDM",
            display_name="Load AR-VDM",
            category=CATEGORY,
            description="Loads an autoregressive video model (Self-Forcing, CausVid, LongLive,"
            " Causal-Forcing, Krea) as published, .pt files too, together with how it is sampled.",
            search_aliases=[
                "self forcing",
                "causvid",
                "longlive",
                "causal forcing",
                "autoregressive video",
                "wan",
                "krea",
                "self-forcing",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.list_files("diffusion_models"),
                    tooltip="A file in models/diffusion_models: .pt or .safetensors as published,"
                    " without conversion.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *PRESETS],
                    default=AUTO,
                    tooltip="How the model was trained to be sampled. auto: as the file's name or"
                    " metadata says.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default=AUTO,
                    tooltip="Data type of the weights in memory. auto: ComfyUI's choice for the"
                    " device.",
                ),
                io.Combo.Input(
                    "weights",
                    options=[AUTO, "ema", "raw"],
                    default=AUTO,
                    advanced=True,
                    tooltip="Which weights to use where a file holds both averaged (ema) and last"
                    " (raw) ones. auto: its authors' choice.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model, with its preset attached; LoRAs and patches apply as usual."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **others: object) -> tuple:
        """Change when the file is replaced; a linked file (None) is its own node's to track."""
        path = host.find_file("diffusion_models", file) if file is not None else None
        return stamped(path, file=file, **others)

    @classmethod
    def execute(cls, file: str, preset: str, dtype: str, weights: str) -> io.NodeOutput:
        path = host.find_file("diffusion_models", file)
        name = choose_preset(preset, inspect(path, weights=weights))
        return io.NodeOutput(host.load_model(path, name, dtype, weights))


class LoadDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerLoadDemo",
            display_name="Load AR-VDM Demo",
            category=CATEGORY,
            description="The small models that come with this pack: coloured shapes that move as"
            " their caption says, at 64x64. Nothing to download; runs on a CPU.",
            search_aliases=["sprites", "demo", "example model"],
            inputs=[
                io.Combo.Input(
                    "network", options=["student", "teacher"], default="student", optional=True,
                    tooltip="student: the autoregressive model, for the samplers. teacher: the"
                    " whole-clip model that it was distilled from, for training a refiner.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The sprites' video model, for the Pathwise Refined Sampler.",
                ),
                io.Clip.Output(tooltip="The sprites' text encoder, for CLIP Text Encode."),
                io.Vae.Output(
                    tooltip="The sprites' VAE, for VAE Encode, VAE Decode and VAE Decode Chunks.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, network: str = "student") -> io.NodeOutput:
        return io.NodeOutput(*host.load_demo(network))
