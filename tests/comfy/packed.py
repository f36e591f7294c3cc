"""Import the pack into ComfyUI as a custom node: NAME.py COMFYUI_PATH PACK [files]."""

import importlib.util
import sys

import torch
from launch import skip_torchvision_fakes

comfyui, pack, *files = sys.argv[1:]
skip_torchvision_fakes()
sys.path.insert(0, comfyui)
sys.argv = [sys.argv[0], "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.samplers  # noqa: E402
import folder_paths  # noqa: E402, F401, the sign by which the pack knows ComfyUI
from comfy.patcher_extension import WrappersMP  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "pack", f"{pack}/__init__.py", submodule_search_locations=[pack]
)
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
from pack.nodes.hosts import comfy as host  # noqa: E402
from pack.nodes.hosts.comfy_held import identity_of  # noqa: E402
from pack.nodes.hosts.comfy_sampling import PathwiseSampler, reserving  # noqa: E402
from pack.nodes.run import Run, plan_run  # noqa: E402
from pack.refiner.schedule import PRESETS  # noqa: E402

SHAPE = (1, 21, 16, 16)  # batch, latent frames, height, width


def sampled(model, run, *wrappers) -> torch.Tensor:
    """Sample as the node does, with observing wrappers."""
    run = host.settled(model, run)
    model = reserving(model, run)
    for wrapper in wrappers:
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", wrapper)
    guider = comfy.samplers.CFGGuider(model)
    generator = torch.Generator().manual_seed(0)
    config = host.facts(model).config
    guider.inner_set_conds(
        {"positive": [[torch.randn(1, config.text_len, config.text_dim, generator=generator), {}]]}
    )
    empty = torch.zeros(run.shape)
    sampler = PathwiseSampler(lambda *_: run, identity_of(model))
    return guider.sample(empty, empty, sampler, torch.tensor([1.0, 0.0]), seed=0, disable_pbar=True)


def plain_run(refined=None) -> Run:
    """Return a run of the self-forcing preset, optionally with a refiner."""
    return Run(plan_run(PRESETS["self-forcing"], SHAPE, None), 0, "self-forcing", refined=refined)
