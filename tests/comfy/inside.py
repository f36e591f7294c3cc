"""What only shows inside ComfyUI's process: inside.py COMFYUI_PATH PACK STUDENT TEACHER prints it as one line of JSON.

Run with ComfyUI's interpreter.
"""

import json

import torch
from packed import SHAPE, files, host, plain_run, sampled

# isort: split
import comfy.sd
from pack.nodes.run import kv_bytes

asked: list[float] = []


def look_on(executor, model, noise_shape, conds, *args, **options):
    """Note what the shape that memory is asked for comes to."""
    asked.append(model.model.memory_required(list(noise_shape)))
    return executor(model, noise_shape, conds, *args, **options)


with torch.inference_mode():
    model = host.load_model(files[0], "self-forcing", "fp32", "auto")
    run = plain_run()
    keys_and_values = kv_bytes(run.plan, host.facts(model))
    wide = sampled(model, run, look_on)
    narrow_model = model.clone()
    narrow_model.set_model_compute_dtype(torch.bfloat16)
    narrow = sampled(narrow_model, run)
    demo = host.load_demo("student")[0]
    loaded = [comfy.sd.load_diffusion_model(file) for file in files]
with torch.inference_mode(False):
    fresh = model.clone(force_deepcopy=True)
    own, other = model.model.state_dict(), fresh.model.state_dict()
formats = [one.model.latent_format for one in (demo, model)]
print(
    json.dumps(
        {
            "kv": keys_and_values,
            "asked": asked[0],
            "chunk": model.model.memory_required([1, 16, 3, *SHAPE[2:]]),
            "frame": model.model.memory_required([1, 16, 1, *SHAPE[2:]]),
            "narrow": torch.corrcoef(torch.stack((wide.flatten(), narrow.flatten())))[0, 1].item(),
            "differs": not torch.equal(wide, narrow),
            "copied": all(torch.equal(own[name], other[name]) for name in own),
            "kinds": [type(one.model).__name__ for one in loaded],
            "previews": [[*one.latent_rgb_factors, one.latent_rgb_factors_bias] for one in formats],
            "preset": fresh.get_attachment(host.PRESET),
        }
    )
)
