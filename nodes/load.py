"""Load AR-VDM and Load AR-VDM Demo."""

from pathlib import Path

from ..refiner.schedule import PRESETS, get_preset
from ..refiner.wan.checkpoint import CheckpointInfo, inspect, require_transformer
from .api import CATEGORY, host, io

AUTO = "auto"
DTYPES = (AUTO, "bf16", "fp16", "fp32", "fp8_e4m3fn")


def choose_preset(choice: str, info: CheckpointInfo) -> str:
    """The preset's name: the choice, or what the file proves; ValueError names the likely ones where it does not."""
    if choice != AUTO:
        return choice
    require_transformer(info)
    if info.preset is None:
        reason = info.preset_reason.replace("pass --preset", "set the widget preset to")
        raise ValueError(f"preset of {info.path.name}: {reason}")
    get_preset(info.preset)
    return info.preset


def stamped(path: Path | None, **inputs: object) -> tuple:
    """What ComfyUI tells two runs of a loader by: when its file was written, which another may replace, and inputs."""
    return (path.stat().st_mtime_ns if path and path.exists() else 0, *sorted(map(str, inputs.items())))


class LoadARVDM(io.ComfyNode):
    """A MODEL from a file as its authors published it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerLoadARVDM",
            display_name="Load AR-VDM",
            category=CATEGORY,
            description="Loads an autoregressive video model (Self-Forcing, CausVid, LongLive, Causal-Forcing, Krea)"
            " as published, .pt files too, and how it is sampled with it.",
            search_aliases=["self forcing", "causvid", "longlive", "causal forcing", "autoregressive video"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.list_files("diffusion_models"),
                    tooltip="A file in models/diffusion_models: a .pt or .safetensors as published, no conversion.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *PRESETS],
                    default=AUTO,
                    tooltip="How the model was trained to be sampled; auto is what the file's name or metadata says.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default=AUTO,
                    tooltip="In what the weights are kept. auto is ComfyUI's choice for the device.",
                ),
                io.Combo.Input(
                    "weights",
                    options=[AUTO, "ema", "raw"],
                    default=AUTO,
                    advanced=True,
                    tooltip="Where a file holds both averaged (ema) and last (raw) weights. auto: its authors' choice.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, with its preset attached; LoRAs and patches apply as usual.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **others: object) -> tuple:
        """None is a link, whose node tells its file from others."""
        return stamped(host.find_file("diffusion_models", file) if file is not None else None, file=file, **others)

    @classmethod
    def execute(cls, file: str, preset: str, dtype: str, weights: str) -> io.NodeOutput:
        path = host.find_file("diffusion_models", file)
        name = choose_preset(preset, inspect(path, weights=weights))
        return io.NodeOutput(host.load_model(path, name, dtype, weights))


class LoadDemo(io.ComfyNode):
    """The bundled sprite models as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerLoadDemo",
            display_name="Load AR-VDM Demo",
            category=CATEGORY,
            description="The small models that come with this pack: coloured shapes that move as their caption says,"
            " at 64x64. Nothing to download, runs on a CPU.",
            search_aliases=["sprites", "demo"],
            inputs=[
                io.Combo.Input(
                    "network", options=["student", "teacher"], default="student", optional=True,
                    tooltip="student: the autoregressive model, for the samplers. teacher: the model of whole clips"
                    " that it was distilled from, for training a refiner.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The sprites' video model, for the Pathwise Refined Sampler."),
                io.Clip.Output(tooltip="The sprites' text encoder, for CLIP Text Encode."),
                io.Vae.Output(tooltip="The sprites' VAE, for VAE Encode, VAE Decode and VAE Decode Chunks."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, network: str = "student") -> io.NodeOutput:
        return io.NodeOutput(*host.load_demo(network))
