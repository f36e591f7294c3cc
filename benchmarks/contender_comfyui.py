"""ComfyUI's SamplerARVideo, imported from a checkout.

Importing runs the folder's code, so run this with an interpreter that has ComfyUI's requirements.
ComfyUI is unchanged; its attention is the one that it chooses itself. The cache of its sampler
holds the whole clip, without a window: of a clip of 21 latent frames, the last chunk is timed.
"""

from pathlib import Path

import torch
from against_comfyui import comfyui_sampler, load_comfyui
from contender import CHUNK, FILLING, WINDOW, Contender, Job, Passes
from torch import Tensor


def comfyui(folder: Path, job: Job) -> Contender:
    """Load ComfyUI's sampler."""
    if not (folder / "comfy_extras" / "nodes_ar_video.py").is_file():
        raise ValueError(f"{folder} is no ComfyUI with SamplerARVideo: it has no nodes_ar_video.py")
    kit = job.kit
    model = load_comfyui(folder, job.weights, kit.device, kit.dtype)
    passes = Passes(kit.device)
    passes.hook(model.model.diffusion_model)
    run = comfyui_sampler(model, job.context.cpu(), WINDOW, kit.case.height, kit.case.width)
    return Contender(
        passes,
        run,
        lambda: second_chunk(model, job),
        timed=range(FILLING - 1, FILLING),
        clips=kit.steady_chunks,
        note="no window: the last chunk of 21 frames",
    )


@torch.no_grad()
def second_chunk(model, job: Job) -> Tensor:
    """Return the x0 of the job's second chunk, by the model calls that the sampler makes."""
    from comfy.model_management import load_models_gpu

    load_models_gpu([model])
    network, device, dtype = model.model.diffusion_model, job.kit.device, job.kit.dtype
    state = {
        "kv_caches": network.init_kv_caches(1, 2 * CHUNK * job.frame_tokens, device, dtype),
        "crossattn_caches": network.init_crossattn_caches(1, device, dtype),
    }
    for start, x, sigma in zip((0, CHUNK), job.pair, (0.0, job.level.sigma), strict=True):
        x0 = model.model.apply_model(
            x,
            torch.full((1,), sigma, device=device),
            c_crossattn=job.context,
            transformer_options={"ar_state": {**state, "start_frame": start}},
        )
    return x0
