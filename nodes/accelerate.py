"""Accelerate AR-VDM: compiled parts and CUDA graphs for a MODEL's runs."""

from ..refiner.acceleration import GRAPHS, Acceleration
from .api import CATEGORY, host, io


class AccelerateARVDM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerAccelerate",
            display_name="Accelerate AR-VDM",
            category=CATEGORY,
            description="Makes the pack's samplers faster on a GPU, for many runs or long ones. The"
            " picture stays the same but for rounding.",
            search_aliases=["torch compile", "cuda graphs", "speed", "faster", "optimize"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model from Load AR-VDM; LoRAs come before or after this node.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=True,
                    tooltip="Fuse norms, gates and RoPE by torch.compile. The first run of a size"
                    " takes up to a minute longer, less after a restart, as torch keeps the result."
                    " Needs Triton, on a CPU a C++ compiler.",
                ),
                io.Combo.Input(
                    "graphs",
                    options=list(GRAPHS),
                    default="auto",
                    tooltip="auto: replay as CUDA graphs the passes that repeat from chunk to"
                    " chunk, which pays with a window, chunks of one frame and small models. Takes"
                    " the memory of a pass again.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, sampled faster.")],
        )

    @classmethod
    def execute(cls, model, compile: bool, graphs: str) -> io.NodeOutput:
        return io.NodeOutput(host.accelerated(model, Acceleration(compile, graphs)))
