"""The section of `gpu.py` on a gradient that was not finite on a GPU."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gpu_sections import Kit
from torch.nn.attention import SDPBackend, sdpa_kernel

from autorefiner.refiner.demo.clips import training_prompts
from autorefiner.refiner.train import make_stage
from autorefiner.refiner.train_config import TrainConfig
from autorefiner.refiner.training.options import RefineOptions


def non_finite(kit: Kit) -> dict:
    """Look for the non-finite gradient of `history none, previous joint` on the sprites.

    Trains 40 steps with each attention kernel, with and without replays.
    """
    kernels = {
        "default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
    }  # fmt: skip
    if kit.device.type != "cuda":  # which replays nothing
        kernels = {"default": None}
    results = {}
    for name, kernel in kernels.items():
        for replays in (True, False) if kit.device.type == "cuda" else (False,):
            chosen = nullcontext() if kernel is None else sdpa_kernel([kernel])
            key = f"{name}, {'replayed' if replays else 'eager'}"
            try:
                with chosen:
                    results[key] = first_bad_step(kit, replays)
            except RuntimeError as error:
                results[key] = f"cannot run: {str(error).splitlines()[0][:120]}"
    return results


def first_bad_step(kit: Kit, replays: bool) -> str:
    """Train on the sprites; return the first step with a non-finite gradient, and its operation."""
    options = RefineOptions(
        history="none", previous="joint", steps=40, batch=16, accumulation=1, ratio=1,
        critic_warmup=0, shown=1,
    )  # fmt: skip
    if kit.device.type == "cpu":  # a rehearsal
        options = replace(options, rank=2, steps=1, batch=1, frames=3)
    with TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"  # a few: the bundle's thousands take seconds
        prompts.write_text("\n".join(training_prompts(64)))
        unused = Path(folder) / "unused"
        config = TrainConfig(unused, unused, prompts=str(prompts), refiner=options)
        stage = make_stage(config, kit.device)
    stage.replay.replays &= replays
    detecting = nullcontext() if replays else torch.autograd.set_detect_anomaly(True)
    with detecting:
        for step in range(options.steps):
            try:
                stage.step(step)
            except (RuntimeError, ValueError) as error:
                return f"step {step}: {str(error).splitlines()[0][:200]}"
            gradients = [each.grad for each in stage.factors.values() if each.grad is not None]
            if not all(each.isfinite().all() for each in gradients):
                return f"step {step}: a gradient is not finite"
    return f"finite over {options.steps} steps"
