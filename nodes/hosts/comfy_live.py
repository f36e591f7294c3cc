"""The video of a run in ComfyUI while it is made: where its decoder runs, and who is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import comfy.model_management as management
import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context

from ...refiner.run_plan import RunPlan
from ..live import Decoder, Recorder
from ..run import CHANNELS, Run, held_bytes
from .comfy_model import facts
from .comfy_video import load_decoder, stream_decoder
from .live_route import announce, videos
from .page import page_server, workflow_of


def has_page() -> bool:
    """Whether a page queued the running prompt; without one nobody watches."""
    server = page_server()
    return server is not None and server.client_id is not None


def decoding_bytes(vae: comfy.sd.VAE, plan: RunPlan) -> int:
    """Count the bytes of activations that decoding a chunk takes."""
    shape = (1, CHANNELS, max(plan.lengths), plan.height, plan.width)
    return vae.memory_used_decode(shape, vae.vae_dtype)


def has_room(vae: comfy.sd.VAE, model: ModelPatcher, run: Run) -> bool:
    """Whether a VAE fits beside the loaded model and all that the run will take."""
    device, plan = model.load_device, run.plan
    if management.is_device_cpu(device):
        return True
    chunk = [plan.batch, CHANNELS, max(plan.lengths), plan.height, plan.width]
    running = held_bytes(run, facts(model)) + model.model.memory_required(chunk)
    decoding = decoding_bytes(vae, plan) + management.extra_reserved_memory()
    spare = max(management.minimum_inference_memory(), decoding)
    needed = running + 1.1 * vae.model_size() + spare  # what ComfyUI would make free, and the run
    return needed < management.get_free_memory(device)


def open_decoder(vae: comfy.sd.VAE, plan: RunPlan, room: bool) -> Decoder:
    """Open the decoder; without room, models of the finished run give way to it."""
    if not room:
        load_decoder(vae, decoding_bytes(vae, plan))
    return stream_decoder(vae)


@contextmanager
def recording(
    vae: comfy.sd.VAE | None, model: ModelPatcher, run: Run, node: str | None
) -> Iterator[Recorder | None]:
    """Record a run for the page that queued it; yields None without a VAE or a page."""
    context = get_executing_context()
    if vae is None or context is None or not has_page():
        yield None
        return
    prompt, room = context.prompt_id, has_room(vae, model, run)
    recorder = Recorder(
        videos.begin(node or context.node_id, prompt, workflow_of(prompt)),
        partial(open_decoder, vae, run.plan, room),
        announce,
        model.load_device,
        room,
        management.throw_exception_if_processing_interrupted,
    )
    with recorder:
        yield recorder
