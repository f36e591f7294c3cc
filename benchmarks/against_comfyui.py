"""Compare our sampler with ComfyUI's SamplerARVideo: same process, weights, levels and threads.

    COMFYUI_PATH=~/ComfyUI ~/ComfyUI/.venv/bin/python benchmarks/against_comfyui.py \\
        [--case tiny|wide] [--runs N]

Prints one line for each sampler (seconds, best and median of the runs) and the ratio of the
medians. Run it with ComfyUI's interpreter; our package is imported from this file's checkout.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "comfy"))

from launch import skip_torchvision_fakes  # noqa: E402, how tests start ComfyUI

CASES = {  # sizes of the model, latent frames, latent height and width, text tokens
    "tiny": (dict(dim=256, num_heads=2, ffn_dim=1024, num_layers=6), 21, 16, 16, 512),
    "wide": (dict(dim=1536, num_heads=12, ffn_dim=8960, num_layers=2), 9, 30, 52, 16),
}
CHUNK = 3
CPU = torch.device("cpu")


def import_ours():
    """Import the package of this checkout under its name, without installing it."""
    spec = importlib.util.spec_from_file_location(
        "autorefiner", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["autorefiner"] = module
    spec.loader.exec_module(module)


def load_comfyui(
    path: Path, weights: dict, device: torch.device = CPU, dtype: torch.dtype = torch.float32
):
    """Import ComfyUI from its checkout and load the weights into its causal model."""
    skip_torchvision_fakes()
    sys.path.insert(0, str(path))
    sys.argv = [sys.argv[0], *(["--cpu"] if device.type == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import comfy.utils

    metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    return comfy.sd.load_diffusion_model_state_dict(
        dict(weights), model_options={"dtype": dtype}, metadata=metadata
    )


def comfyui_sampler(model, context, frames: int, height: int, width: int):
    """Return a function that runs SamplerARVideo through SamplerCustom, as a workflow would."""
    from comfy_extras.nodes_ar_video import SamplerARVideo
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    sampler = SamplerARVideo.execute(CHUNK).result[0]
    sigmas = torch.tensor([1.0, 0.9375, 0.8333333, 0.625, 0.0])
    conditioning = [[context, {}]]
    latent = {"samples": torch.zeros(1, 16, frames, height, width)}

    def run() -> torch.Tensor:
        with torch.inference_mode(), contextlib.redirect_stderr(open(os.devnull, "w")):
            out = SamplerCustom.execute(
                model, True, 0, 1.0, conditioning, conditioning, sampler, sigmas, latent
            )
        return out.result[0]["samples"]

    return run


def our_sampler(weights: dict, context, sizes: dict, frames: int, height: int, width: int):
    from autorefiner.refiner.sample import RunPlan, sample
    from autorefiner.refiner.schedule import get_preset
    from autorefiner.refiner.wan.causal import CausalWan
    from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer

    config = WanConfig(**sizes)
    with torch.device("meta"):
        model = WanTransformer(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    network = CausalWan(model.requires_grad_(False), config)
    plan = RunPlan(get_preset("self-forcing"), frames, height, width)
    return lambda: torch.cat(list(sample(network, context, plan)), dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes, frames, height, width, tokens = CASES[args.case]

    import_ours()
    from autorefiner.refiner.wan.transformer import WanConfig, WanTransformer

    torch.manual_seed(0)
    weights = WanTransformer(WanConfig(**sizes)).state_dict()
    context = torch.randn(1, tokens, 4096)
    path = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
    samplers = {
        "SamplerARVideo": comfyui_sampler(
            load_comfyui(path, weights), context, frames, height, width
        ),
        "autorefiner": our_sampler(weights, context, sizes, frames, height, width),
    }
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for run in range(args.runs + 1):  # the first one warms up; the two take turns
        for name, sampler in samplers.items():
            start = time.perf_counter()
            sampler()
            if run:
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        best, median = min(values), statistics.median(values)
        print(f"{name:<16} best {best:7.3f} s   median {median:7.3f} s   ({args.runs} runs)")
    ratio = statistics.median(seconds["SamplerARVideo"]) / statistics.median(seconds["autorefiner"])
    print(f"{args.case}: {ratio:.2f} times as fast, {frames} latent frames, {args.threads} threads")


if __name__ == "__main__":
    main()
