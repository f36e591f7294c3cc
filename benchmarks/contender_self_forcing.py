"""The public Self-Forcing pipeline, imported from a checkout of guandeh17/Self-Forcing.

Importing runs the folder's code. Its `CausalInferencePipeline`, `WanDiffusionWrapper`,
`CausalWanModel` and scheduler run unchanged, but for this:

- `attention` and `flash_attention` are torch's scaled_dot_product_attention, in the dtype of the
  query: the fallback there is for bf16 only, and cross-attention has none.
- The model is built with the given sizes instead of being read from wan_models/, with a window of
  21 frames (`local_attn_size`). K/V caches, numbers of blocks and of tokens a frame, which the code
  fixes at those of 1.3B and 832×480, are set to the model's.
- The text encoder returns the given context, the VAE the latents: the transformer alone is timed.
- What inference does not call is not imported: diffusers' base classes, tokenizer, text encoder,
  VAE, memory helpers, and the `__init__` files of the packages.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from contender import CHUNK, FILLING, PRESET, WINDOW, Contender, Job, Passes
from torch import Tensor, nn

PACKAGES = ("wan", "wan.modules", "pipeline", "utils", "demo_utils")
STAND_INS = {  # modules, and the names that are imported from them
    "diffusers": {},
    "diffusers.configuration_utils": {
        "ConfigMixin": type("ConfigMixin", (), {}),
        "register_to_config": lambda function: function,
    },
    "diffusers.models": {},
    "diffusers.models.modeling_utils": {"ModelMixin": nn.Module},
    "wan.modules.tokenizers": {"HuggingfaceTokenizer": None},
    "wan.modules.t5": {"umt5_xxl": None},
    "wan.modules.vae": {"_video_vae": None},
    "demo_utils.memory": dict.fromkeys(
        (
            "gpu",
            "get_cuda_free_memory_gb",
            "DynamicSwapInstaller",
            "move_model_to_device_with_memory_preservation",
        )
    ),
}


def attention(q_BNHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, k_lens: None = None) -> Tensor:
    """Return attention over all keys [B, N, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Make the checkout's packages importable; forget them afterwards, as the names are common."""
    if not (folder / "pipeline" / "causal_inference.py").is_file():
        raise ValueError(f"{folder} is no checkout of Self-Forcing: it has no causal_inference.py")
    hidden = {name: sys.modules[name] for name in list(sys.modules) if is_public(name)}
    for name in hidden:
        del sys.modules[name]
    for name in PACKAGES:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder / name.replace(".", "/"))]
    for name, contents in STAND_INS.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if is_public(name)]:
            del sys.modules[name]
        sys.modules.update(hidden)


def is_public(name: str) -> bool:
    """Tell whether a module is the checkout's, or stands in for one that it imports."""
    return name.partition(".")[0] in (*PACKAGES, "diffusers")


def import_public(folder: Path) -> tuple[ModuleType, ModuleType, ModuleType]:
    """Import the model, its wrapper and the pipeline, with the attention above."""
    with importable(folder):
        causal_model = import_module("wan.modules.causal_model")
        wrapper = import_module("utils.wan_wrapper")
        pipeline = import_module("pipeline.causal_inference")
        import_module("wan.modules.model").flash_attention = attention
    causal_model.attention = attention
    return causal_model, wrapper, pipeline


def build_model(model_class: type[nn.Module], job: Job) -> nn.Module:
    """Build the model with the job's weights."""
    with torch.device(job.kit.device):
        model = model_class(**asdict(job.config), local_attn_size=WINDOW)
    model.to(job.kit.dtype).requires_grad_(False).load_state_dict(job.weights)
    for block in model.blocks:
        block.self_attn.max_attention_size = WINDOW * job.frame_tokens
    return model


def build_pipeline(folder: Path, job: Job) -> nn.Module:
    """Build the pipeline around a model with the job's weights."""
    causal_model, wrapper, pipeline = import_public(folder)
    model_class = causal_model.CausalWanModel
    model = build_model(model_class, job)
    with patch.object(model_class, "from_pretrained", lambda *_, **__: model, create=True):
        generator = wrapper.WanDiffusionWrapper(
            timestep_shift=PRESET.shift, is_causal=True, local_attn_size=WINDOW
        )
    options = SimpleNamespace(
        denoising_step_list=list(PRESET.levels),
        warp_denoising_step=PRESET.warp,
        num_frame_per_block=CHUNK,
        independent_first_frame=False,
        context_noise=0,
    )
    result = pipeline.CausalInferencePipeline(
        options, job.kit.device, generator, Prompt(job.context), Undecoded()
    )
    allocate_caches(result, job)
    return result


class Prompt(nn.Module):
    """A text encoder that knows one prompt."""

    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.context = context

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": self.context}


class Undecoded(nn.Module):
    """A VAE that leaves latents as they are."""

    def decode_to_pixel(self, latents: Tensor, use_cache: bool) -> Tensor:
        return latents


def allocate_caches(pipeline: nn.Module, job: Job) -> None:
    """Give the pipeline caches of the model's sizes, which it resets before each clip."""
    config, device = job.config, job.kit.device
    pipeline.num_transformer_blocks = config.num_layers
    pipeline.frame_seq_length = job.frame_tokens

    def empty(tokens: int) -> dict[str, Tensor]:
        shape = 1, tokens, config.num_heads, config.head_dim
        return {name: torch.zeros(shape, dtype=job.kit.dtype, device=device) for name in "kv"}

    def ends() -> dict[str, Tensor]:
        names = "global_end_index", "local_end_index"
        return {name: torch.zeros(1, dtype=torch.long, device=device) for name in names}

    layers = range(config.num_layers)
    pipeline.kv_cache1 = [{**empty(WINDOW * job.frame_tokens), **ends()} for _ in layers]
    pipeline.crossattn_cache = [{**empty(config.text_len), "is_init": False} for _ in layers]


def self_forcing(folder: Path, job: Job) -> Contender:
    """Load the public pipeline."""
    with redirect_stdout(StringIO()):
        pipeline = build_pipeline(folder, job)
    passes = Passes(job.kit.device)
    passes.hook(pipeline.generator.model)
    steady = range(FILLING, FILLING + job.kit.steady_chunks)
    noise = job.latents(CHUNK * steady.stop, 4).transpose(1, 2).contiguous()

    @torch.no_grad()
    def second_chunk() -> Tensor:
        past, noisy = job.pair
        denoise(pipeline, job, past, 0.0, 0)
        return denoise(pipeline, job, noisy, job.level.t, CHUNK)

    @torch.no_grad()
    def run() -> None:
        with redirect_stdout(StringIO()):
            pipeline.inference(noise, [""])

    return Contender(passes, run, second_chunk, steady, note="SDPA in place of flash_attn")


def denoise(pipeline: nn.Module, job: Job, x: Tensor, t: float, start: int) -> Tensor:
    """Return the x0 of a chunk [1, C, F, h, w] that starts at this frame; write its K/V."""
    _, x0 = pipeline.generator(
        noisy_image_or_video=x.to(job.kit.dtype).transpose(1, 2),
        conditional_dict=pipeline.text_encoder([""]),
        timestep=torch.full((1, CHUNK), t, device=job.kit.device),
        kv_cache=pipeline.kv_cache1,
        crossattn_cache=pipeline.crossattn_cache,
        current_start=start * job.frame_tokens,
    )
    return x0.transpose(1, 2)
