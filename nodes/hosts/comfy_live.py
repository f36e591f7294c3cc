"""The video of a run in ComfyUI while it is made: where its decoder runs, and who is told."""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management as management
import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...refiner.wan.vae import DecoderState, normalized
from ..live import Decoder, Recorder
from ..run import CHANNELS, Run, held_bytes
from .comfy_model import facts
from .comfy_training import own_vae
from .live_route import announce, videos
from .page import workflow_of


def stream_decoder(vae: comfy.sd.VAE) -> Decoder:
    """Open a decoder of consecutive chunks of one video."""
    wan, state = own_vae(vae), DecoderState()
    weight = next(wan.parameters())

    def decode(raw_1Cfhw: Tensor) -> Tensor:
        pixels = wan.decode(normalized(raw_1Cfhw).to(weight), state)
        return ((pixels[0].permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1).cpu()

    return decode


def has_page() -> bool:
    """Whether a page queued the running prompt; without one nobody watches."""
    from server import PromptServer

    return PromptServer.instance is not None and PromptServer.instance.client_id is not None


def has_room(vae: comfy.sd.VAE, model: ModelPatcher, run: Run) -> bool:
    """Whether a VAE fits beside the loaded model and all that the run will take."""
    device = model.load_device
    if management.is_device_cpu(device):
        return True
    plan = run.plan
    chunk = max(plan.lengths)
    sampling = model.model.memory_required([plan.batch, CHANNELS, chunk, plan.height, plan.width])
    decoding = vae.memory_used_decode((1, CHANNELS, chunk, plan.height, plan.width), vae.vae_dtype)
    extra = max(
        management.minimum_inference_memory(), decoding + management.extra_reserved_memory()
    )
    needed = held_bytes(run, facts(model)) + sampling + 1.1 * vae.model_size() + extra
    return needed < management.get_free_memory(device)


@contextmanager
def recording(
    vae: comfy.sd.VAE | None, model: ModelPatcher, run: Run, node: str | None
) -> Iterator[Recorder | None]:
    """Record a run for the page that queued it; yields None without a VAE or a page."""
    context = get_executing_context()
    if vae is None or context is None or not has_page():
        yield None
        return
    prompt = context.prompt_id
    recorder = Recorder(
        videos.begin(node or context.node_id, prompt, workflow_of(prompt)),
        lambda: stream_decoder(vae),
        announce,
        model.load_device,
        has_room(vae, model, run),
        management.throw_exception_if_processing_interrupted,
    )
    with recorder:
        yield recorder
