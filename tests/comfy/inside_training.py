"""Report the weights that a training takes from a MODEL in ComfyUI's process as JSON.

Usage: inside_training.py COMFYUI_PATH PACK STUDENT, with ComfyUI's interpreter.
"""

import json

import torch
from packed import comfy, files, host

# isort: split
from pack.refiner.wan.checkpoint import load_transformer

LORA = "blocks.1.ffn.2"
generator = torch.Generator().manual_seed(1)
down, up = (torch.randn(shape, generator=generator) for shape in ((2, 128), (128, 2)))
report = {}


def taken(model) -> dict[str, torch.Tensor]:
    """Return the weights of the copy that a training gets."""
    with host.training():
        network = host.own_network(model).model
        parameters = dict(network.named_parameters())
        report["frozen"] = not any(one.requires_grad for one in parameters.values())
        report["plain"] = not any(one.is_inference() for one in parameters.values())
        report["grad"] = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return parameters


with torch.inference_mode():
    model = host.load_model(files[0], "self-forcing", "fp32", "auto")
    stored = dict(load_transformer(files[0], dtype=torch.float32)[0].named_parameters())
    own = taken(model)
    report["names"] = own.keys() == stored.keys()
    report["same"] = all(torch.equal(own[name], stored[name]) for name in stored)
    lora = {
        f"diffusion_model.{LORA}.lora_A.weight": down,
        f"diffusion_model.{LORA}.lora_B.weight": up,
    }
    patched = taken(comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0])
    change = patched[f"{LORA}.weight"] - stored[f"{LORA}.weight"]
    report["lora"] = (change - up @ down).abs().max().item()
    report["others"] = all(
        torch.equal(patched[name], stored[name]) for name in stored if LORA not in name
    )
    after = taken(model)
    report["left"] = all(torch.equal(after[name], stored[name]) for name in stored)
    report["mode"] = torch.is_inference_mode_enabled()
print(json.dumps(report))
