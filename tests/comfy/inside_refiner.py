"""Report what a refiner does in ComfyUI's process as JSON.

Usage: inside_refiner.py COMFYUI_PATH PACK STUDENT REFINER, with ComfyUI's interpreter.
"""

import dataclasses
import json

import torch
from packed import SHAPE, comfy, files, host, plain_run, sampled

# isort: split
from pack.nodes.hosts import comfy_layers
from pack.nodes.hosts.comfy_model import network_of
from pack.nodes.refiner_plan import RefinerLora, plan_refiner
from pack.refiner.noise.file import load_refiner
from pack.refiner.noise.refiner import target_modules

student, refiner = files
LORA = "diffusion_model.blocks.1.ffn.2"
asked: list[float] = []
report: dict = {"asked": {}, "hooks": {}}


def look_on(executor, model, noise_shape, conds, *args, **options):
    """Record memory_required() of the shape that sampling is prepared for."""
    asked.append(model.model.memory_required(list(noise_shape)))
    return executor(model, noise_shape, conds, *args, **options)


def refined(model, form: str):
    """Return a run with the refiner in the given form."""
    facts = host.facts(model)
    lora = RefinerLora("a.refiner.safetensors", *load_refiner(refiner), form=form)
    return plain_run(
        plan_refiner(lora, facts.config, facts.dtype, (1000, 750, 500, 250), None, None)
    )


def hooks(model) -> int:
    """Count the forward hooks on the layers."""
    return sum(len(module._forward_hooks) for module in target_modules(network_of(model)).values())


def while_it_runs(model, run, wish) -> None:
    """Sample, and call `wish` at the first prediction of the second chunk."""

    def clip(self, network, *args, **options):
        callback = args[3]

        def called(progress):
            if progress.chunk.index == 1:
                wish()
            callback(progress)

        return own(self, network, *args[:3], called, *args[4:], **options)

    own, type(run).clip = type(run).clip, clip
    try:
        sampled(model, run)
    finally:
        type(run).clip = own


def interrupt() -> None:
    raise comfy.model_management.InterruptProcessingException


def patched(model):
    """Return a clone of the model with a LoRA on one layer."""
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 128), (128, 2)))
    lora = {f"{LORA}.lora_A.weight": 0.3 * down, f"{LORA}.lora_B.weight": 0.3 * up}
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def weights_of(model, lowvram: bool) -> dict[str, torch.Tensor]:
    """Return every merged weight of a model loaded whole, or with a budget of one byte."""
    with torch.inference_mode():
        model.load(
            torch.device("cpu"), **({"lowvram_model_memory": 1} if lowvram else {"full_load": True})
        )
        read = comfy_layers.weights_on(torch.device("cpu"), torch.float32)
        found = {
            name: read(module)[0] for name, module in target_modules(network_of(model)).items()
        }
        waiting = sum(
            len(module.weight_function) for module in target_modules(network_of(model)).values()
        )
        assert (waiting > 0) is lowvram, f"{waiting} weights wait for their LoRA"
        model.detach()
    return found


with torch.inference_mode():
    model = host.load_model(student, "self-forcing", "fp32", "auto")
    report["hooks"]["before"] = hooks(model)
    made = {}
    for form in ("merged", "unmerged"):
        made[form] = sampled(model, refined(model, form), look_on)
        report["asked"][form] = asked[-1]
    report["forms"] = (made["merged"] - made["unmerged"]).abs().max().item()
    while_it_runs(
        model, refined(model, "unmerged"), lambda: report["hooks"].update(during=hooks(model))
    )
    report["hooks"]["after"] = hooks(model)
    try:
        while_it_runs(model, refined(model, "unmerged"), interrupt)
    except comfy.model_management.InterruptProcessingException:
        report["hooks"]["interrupted"] = hooks(model)
    joint = refined(model, "merged")
    cache = dataclasses.replace(joint.refined.cache, previous="joint")
    sampled(
        model,
        dataclasses.replace(joint, refined=dataclasses.replace(joint.refined, cache=cache)),
        look_on,
    )
    report["asked"]["joint"] = asked[-1]
    report["auto"] = [host.settled(model, refined(model, "auto")).refined.form]
    own, comfy_layers.available_bytes = comfy_layers.available_bytes, lambda device: 1000
    report["auto"].append(host.settled(model, refined(model, "auto")).refined.form)
    comfy_layers.available_bytes = own
    layer = network_of(model).blocks[0].ffn[0]
    layer.__class__, kind = type("Odd", (type(layer),), {"__module__": "gguf"}), type(layer)
    report["odd"] = [
        host.settled(model, refined(model, form)).refined.form for form in ("merged", "auto")
    ]
    report["odd made"] = (
        (sampled(model, refined(model, "merged")) - made["unmerged"]).abs().max().item()
    )
    layer.__class__ = kind
    narrow = host.load_model(student, "self-forcing", "fp8_e4m3fn", "auto")
    both = [sampled(narrow, refined(narrow, form)).flatten() for form in ("merged", "unmerged")]
    report["narrow"] = torch.corrcoef(torch.stack(both))[0, 1].item()
    report["chunk"], report["frame"] = (
        model.model.memory_required([1, 16, n, *SHAPE[2:]]) for n in (3, 1)
    )

plain = weights_of(model, lowvram=False)
whole, waiting = (weights_of(patched(model), lowvram) for lowvram in (False, True))
name = LORA.removeprefix("diffusion_model.")
report["patched"] = (whole[name] - plain[name]).abs().max().item()
report["offloaded"] = max((whole[name] - waiting[name]).abs().max().item() for name in whole)
print(json.dumps(report))
