"""Report internals of the pack in ComfyUI's process as JSON.

Usage: inside.py COMFYUI_PATH PACK STUDENT TEACHER FILES..., with ComfyUI's interpreter.
"""

import base64
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from inside_published import answer
from packed import PRESETS, SHAPE, Run, files, host, plain_run, plan_run, sampled
from PIL import Image

# isort: split
sys.path.append(str(Path(__file__).parents[1]))
import comfy.ldm.modules.attention as backends
import comfy.model_management as management
import comfy.sd
from comfy.model_patcher import ModelPatcher
from node_host import mismatches
from pack.nodes.hosts import comfy_live, comfy_sampling, comfy_video, page
from pack.nodes.hosts.comfy_model import PRESET
from pack.nodes.hosts.protocol import NodeHost
from pack.nodes.passes import Passes
from pack.nodes.run import kv_bytes
from pack.nodes.run_states import RunState
from pack.refiner.acceleration import Acceleration
from pack.refiner.rollout import Progress
from pack.refiner.wan.causal import attention

asked: list[float] = []


def look_on(executor, model, noise_shape, conds, *args, **options):
    """Record memory_required() of the shape that sampling is prepared for."""
    asked.append(model.model.memory_required(list(noise_shape)))
    return executor(model, noise_shape, conds, *args, **options)


class Grey:
    """Pictures whose brightness is a latent's first value."""

    def show(self, progress: Progress, finished: bool) -> None:
        """Any frame is drawn alike."""

    def __call__(self, latent: torch.Tensor) -> Image.Image:
        return Image.new("RGB", (8, 8), 3 * (round(float(latent.flatten()[0])),))


def events_of_chunk(method: str, x0: float) -> list[tuple[int, int, int]]:
    """Return (level, levels, brightness) events of a chunk that is x0 after two predictions of 9.

    Each of its two levels is predicted once.
    """
    plan = plan_run(PRESETS["self-forcing"].changed(levels=(1000, 750)), SHAPE, None)
    run, sent = Run(plan, 0, method), []

    def receive(event: str, state: RunState, update: dict) -> None:
        image = Image.open(io.BytesIO(base64.b64decode(update["image"])))
        sent.append((update["level"], update["levels"], image.getpixel((0, 0))[0]))

    page.send = receive
    watch, passes = page.Watch(run, RunState("1", "none"), Grey()), Passes(run)
    chunk, latents = plan.chunks[0], torch.ones(1, 16, 3, 2, 2)
    for level in (0, 1):
        watch.shown = 0.0
        progress = Progress(chunk, len(plan.chunks), level, 9 * latents)
        passes.step(progress)
        watch.step(progress, passes)
    watch.finished(chunk, x0 * latents)
    return sent


def freed_for(nbytes: int) -> list[tuple[int, str]]:
    """Return what free_memory is asked for when a reward's models move to a GPU."""
    found, own = [], (management.get_torch_device, management.free_memory)
    management.get_torch_device = lambda: torch.device("cuda")
    management.free_memory = lambda nbytes, device: found.append((nbytes, device.type))
    host.torch_device(nbytes)
    management.get_torch_device, management.free_memory = own
    return found


def masked_attention() -> dict[str, float]:
    """Return how far a mask by head and query token leads each backend from the core's result."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 8, 2, 16, generator=generator)
    hidden = torch.rand(2, 2, 8, 8, generator=generator) > 0.7
    mask = torch.zeros(2, 2, 8, 8).masked_fill(hidden, torch.finfo(torch.float32).min)
    backends.sageattn = lambda q, k, v, **_: attention(q, k, v).view_as(q)
    apart = {}
    for name in ("pytorch", "basic", "split", "sub_quad", "sage"):
        comfy_sampling.optimized_attention = getattr(backends, f"attention_{name}")
        out = comfy_sampling.attend({}, q, k, v, mask)
        apart[name] = float((out - attention(q, k, v, mask)).abs().max())
    return apart


def streamed(vae: comfy.sd.VAE) -> dict:
    """Compare the pack's streaming decoder with ComfyUI's decode, which has the same weights."""
    raw = torch.randn(1, 16, 7, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = vae.decode(raw)[0]
    decode_next = host.stream_decoder(vae)  # outside inference mode, as in a thread
    frames = [decode_next(piece) for piece in raw.split((3, 1, 1, 2), dim=2)]
    theirs = vae.first_stage_model.state_dict()
    ours = comfy_video.decoder_of(vae).model.state_dict()
    return {
        "lengths": [len(piece) for piece in frames],
        "apart": float((torch.cat(frames) - whole).abs().max()),
        "shared": all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours),
        "counted": comfy_video.decoder_of(vae).model_size()
        == sum(tensor.nbytes for name, tensor in ours.items()),
        "once": comfy_video.decoder_of(vae) is comfy_video.decoder_of(vae),
    }


def graphs_of() -> list[str]:
    """Return graphs of runs whose weights stay in place, are offloaded in part, are streamed."""
    known = SimpleNamespace(acceleration=Acceleration(graphs="auto"), device=torch.device("cuda"))
    graphs = []
    for lowvram, dynamic in ((False, False), (True, False), (False, True)):
        model = SimpleNamespace(
            model=SimpleNamespace(model_lowvram=lowvram), is_dynamic=lambda dynamic=dynamic: dynamic
        )
        graphs.append(comfy_sampling.acceleration_for(model, known).graphs)
    return graphs


def room_of_vae(model: ModelPatcher, vae: comfy.sd.VAE) -> list[bool]:
    """Return whether the VAE has room on a GPU with less and less memory free."""
    run, own = plain_run(), (management.is_device_cpu, management.get_free_memory)
    management.is_device_cpu = lambda device: False
    rooms = []
    spare = management.minimum_inference_memory() + vae.model_size()
    for free in (2 * spare + (1 << 33), spare, 0):
        management.get_free_memory = lambda device, free=free: free
        rooms.append(comfy_live.has_room(vae, model, run))
    management.is_device_cpu, management.get_free_memory = own
    return [*rooms, comfy_live.has_room(vae, model, run)]


with torch.inference_mode():
    model = host.load_model(files[0], "self-forcing", "fp32", "auto")
    run = plain_run()
    keys_and_values, _ = kv_bytes(run, host.facts(model))
    wide = sampled(model, run, look_on)
    narrow_model = model.clone()
    narrow_model.set_model_compute_dtype(torch.bfloat16)
    narrow = sampled(narrow_model, run)
    demo, _, vae = host.load_demo("student")
    loaded = [comfy.sd.load_diffusion_model(file) for file in files[:2]]
    answers = [answer(Path(file)) for file in files[2:]]
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
            "kinds": [type(one.model).__name__ for one in loaded],
            "freed": freed_for(1000),
            "room": room_of_vae(demo, vae),
            "least": management.minimum_inference_memory(),
            "events": {
                "repeats": events_of_chunk("self-refine", 9),
                "chosen": events_of_chunk("self-forcing", 200),
                "last": events_of_chunk("self-forcing", 9),
            },
            "published": answers,
            "host": mismatches(NodeHost, host),
            "masked": masked_attention(),
            "graphs": graphs_of(),
            "streamed": streamed(vae),
            "preset": fresh.get_attachment(PRESET),
        }
    )
)
