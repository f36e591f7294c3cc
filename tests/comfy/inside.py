"""What only shows inside ComfyUI's process: inside.py COMFYUI_PATH PACK STUDENT prints it as one line of JSON.

Run with ComfyUI's interpreter, on its own modules; the pack is imported as a custom node is.
"""

import importlib.util
import json
import sys

import torch
from launch import skip_torchvision_fakes

comfyui, pack, student = sys.argv[1:]
skip_torchvision_fakes()
sys.path.insert(0, comfyui)
sys.argv = [sys.argv[0], "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.samplers  # noqa: E402
import folder_paths  # noqa: E402, F401, the sign by which the pack knows ComfyUI
from comfy.patcher_extension import WrappersMP  # noqa: E402

spec = importlib.util.spec_from_file_location("pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
from pack.nodes.hosts import comfy as host  # noqa: E402
from pack.nodes.run import Run, kv_bytes, plan_run  # noqa: E402
from pack.refiner.schedule import PRESETS  # noqa: E402

SHAPE = (1, 21, 16, 16)  # batch, latent frames, height, width


def sampled(model, run, *wrappers) -> torch.Tensor:
    """A run as the node does it, with wrappers that look on."""
    model = host.reserving(model, run)
    for wrapper in wrappers:
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", wrapper)
    guider = comfy.samplers.CFGGuider(model)
    generator = torch.Generator().manual_seed(0)
    config = host.facts(model).config
    guider.inner_set_conds({"positive": [[torch.randn(1, config.text_len, config.text_dim, generator=generator), {}]]})
    empty = torch.zeros(run.shape)
    sampler = host.PathwiseSampler(lambda *_: run, reserved=True)
    return guider.sample(empty, empty, sampler, torch.tensor([1.0, 0.0]), seed=0, disable_pbar=True)


asked: list[float] = []


def look_on(executor, model, noise_shape, conds, *args, **options):
    """Note what the shape that memory is asked for comes to."""
    asked.append(model.model.memory_required(list(noise_shape)))
    return executor(model, noise_shape, conds, *args, **options)


with torch.inference_mode():
    model = host.load_model(student, "self-forcing", "fp32", "auto")
    run = Run(plan_run(PRESETS["self-forcing"], SHAPE, None), 0, "self-forcing")
    keys_and_values = kv_bytes(run.plan, host.facts(model))
    wide = sampled(model, run, look_on)
    narrow_model = model.clone()
    narrow_model.set_model_compute_dtype(torch.bfloat16)
    narrow = sampled(narrow_model, run)
with torch.inference_mode(False):
    fresh = model.clone(force_deepcopy=True)
    own, other = model.model.state_dict(), fresh.model.state_dict()
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
            "preset": fresh.get_attachment(host.PRESET),
        }
    )
)
