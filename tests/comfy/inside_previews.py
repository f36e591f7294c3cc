"""Report pictures of a run of the bundled demo, and of decoders in models/, as JSON.

Usage: inside_previews.py COMFYUI_PATH PACK, with ComfyUI's interpreter.
"""

import base64
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from packed import comfy, folder_paths, host
from PIL import Image

# isort: split
import comfy.latent_formats
import comfy.taesd.taehv
import comfy.utils
import latent_preview
from comfy_execution.utils import CurrentNodeContext
from pack.nodes.hosts import comfy_previews, page
from pack.nodes.hosts.comfy_previews import FOLDER, LinearPictures, TinyPictures, decoded, image_of
from pack.nodes.run import Run, plan_run
from pack.nodes.run_states import RunState
from pack.refiner.demo.bundle import load_sprite_tiny, load_sprite_vae
from pack.refiner.rollout import Progress
from pack.refiner.schedule import PRESETS, plan_chunks
from pack.refiner.wan.checkpoint import save_safetensors
from pack.refiner.wan.latent_statistics import raw_latents
from pack.refiner.wan.tiny_vae import TinyVAE
from pack.refiner.wan.vae_layers import StreamState

FRAMES, SIDE = 6, 8  # two chunks
PROMPT = "a red star moves up and down to the left of a green circle that pulsates on a navy ground"
sheets: list[Image.Image] = []  # of the finished chunks, as the page gets them
bars: list[tuple[int, int]] = []  # sizes of ComfyUI's own previews
notices: list[str] = []


def receive(event: str, state: RunState, data: dict) -> None:
    if "image" in data and data["level"] == data["levels"]:
        sheets.append(Image.open(io.BytesIO(base64.b64decode(data["image"]))))


def progress(value, total, preview, **_) -> None:
    if preview:
        bars.append(preview[1].size)


def psnr(rough: torch.Tensor, whole: torch.Tensor) -> float:
    return (10 * torch.log10(4 / (rough - whole).square().mean())).item()


def drawn() -> torch.Tensor:
    """Return the pictures of all finished chunks side by side, [1, 3, H, W] in [-1, 1]."""
    pictures = [torch.from_numpy(np.array(sheet)).movedim(-1, 0) for sheet in sheets]
    return torch.cat(pictures, dim=-1)[None] / 127.5 - 1


def run_of_demo() -> dict:
    """Sample the demo and compare its pictures with the VAE's pixels and their 8x8 means."""
    model, clip, _ = host.load_demo("student")
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    run = Run(plan_run(PRESETS["self-forcing"], (1, FRAMES, SIDE, SIDE), None), 0, "self-forcing")
    with CurrentNodeContext("prompt", "1"):
        latents = host.sample(model, positive, run)
    latents = model.model.process_latent_in(latents)
    frames = load_sprite_vae().decode(latents).clamp(-1, 1)[:, :, ::4]  # each latent's last
    whole = torch.cat([*frames.unbind(2)], dim=-1)
    means = F.interpolate(F.avg_pool2d(whole, 8), size=whole.shape[2:])
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    one = previewer.decode_latent_to_preview(latents[:, :, :1]).resize((8 * SIDE, 8 * SIDE))
    core = torch.from_numpy(np.array(one)).movedim(-1, 0)[None] / 127.5 - 1
    return {
        "tiny": psnr(drawn(), whole),
        "means": psnr(means, whole),
        "bars": bars,
        "core": psnr(core, frames[:, :, 0]),
        "other": model.model.latent_format.latent_rgb_factors
        != comfy.latent_formats.Wan21().latent_rgb_factors,
    }


def as_core() -> dict:
    """Compare whole and streamed clips with ComfyUI's class, with random weights."""
    core = comfy.taesd.taehv.TAEHV(16)
    core.load_state_dict(
        {
            name: torch.randn_like(one) * (one[0].numel() ** -0.5 if one.ndim > 1 else 0.1)
            for name, one in core.state_dict().items()
        }
    )
    tiny, latents = TinyVAE.from_state_dict(core.state_dict()), torch.randn(2, 16, 5, 4, 6)
    expected, state = 2 * core.decode(latents) - 1, StreamState()
    pieces = [tiny.decode(piece, state) for piece in latents.split([1, 3, 1], dim=2)]
    apart = (tiny.decode(latents) - expected, torch.cat(pieces, dim=2) - expected)
    return {
        "apart": [difference.abs().max().item() for difference in apart],
        "spread": expected.std().item(),
    }


def in_turn() -> dict:
    """Draw two chunks; report whether pictures go on, and what an early prediction costs."""
    tiny, seconds = load_sprite_tiny(), iter(range(100))
    clip, early = torch.randn(2, 1, 16, FRAMES, 4, 4)
    whole = decoded(tiny, clip)[0, :, ::4].unbind(1)
    linear = LinearPictures(comfy.latent_formats.Wan21())
    pictures = TinyPictures(tiny, linear, lambda: next(seconds))
    chunks = plan_chunks(PRESETS["self-forcing"], FRAMES)[1]

    def draw(chunk, latents: torch.Tensor, finished: bool) -> list[bytes]:
        x0 = latents[:, :, chunk.start : chunk.start + chunk.length]
        pictures.show(Progress(chunk, len(chunks), 0, x0), finished)
        return [pictures(frame).tobytes() for frame in x0.split(1, dim=2)]

    first = draw(chunks[0], early, False)
    again = draw(chunks[0], clip, False)  # a second later: too early for a new picture
    drawn = draw(chunks[0], clip, True) + draw(chunks[1], clip, True)
    return {
        "goes_on": drawn == [image_of(frame).tobytes() for frame in whole],
        "spares": again == first,
    }


class Failing(torch.nn.Linear):
    def decode(self, latents: torch.Tensor, state: StreamState | None = None) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory for pictures")


def after_an_error() -> dict:
    """Draw a chunk by a decoder that fails; report its pictures and what is said."""
    said: list[str] = []
    comfy_previews.notice = said.append
    linear = LinearPictures(comfy.latent_formats.Wan21())
    pictures, x0 = TinyPictures(Failing(1, 1), linear), torch.randn(1, 16, 3, 4, 4)
    pictures.show(Progress(plan_chunks(PRESETS["self-forcing"], 3)[1][0], 1, 0, x0), True)
    frames = x0.split(1, dim=2)
    drawn, expected = ([draw(frame).tobytes() for frame in frames] for draw in (pictures, linear))
    return {"linear": drawn == expected, "said": said}


def files_of_decoders(folder: Path) -> dict:
    """Report which decoder is read from models/vae_approx, by the files there."""
    folder_paths.folder_names_and_paths[FOLDER] = ([str(folder)], {".safetensors", ".pth"})
    comfy_previews.notice = notices.append
    weights = TinyVAE((4, 4, 4, 4)).state_dict()
    latents, cpu = torch.randn(1, 16, 2, 2, 2), torch.device("cpu")
    expected, report = TinyVAE.from_state_dict(weights), {}

    def read(*names: str) -> TinyVAE | None:
        for old in folder.iterdir():
            old.unlink()
        for name in names:
            save_safetensors(folder / name, weights, {})
        folder_paths.filename_list_cache.clear()
        return comfy_previews.read_decoder(cpu)

    report["none"] = read("taehv.safetensors", "taew2_1.pth") is None
    tiny = read("taew2_1.safetensors")
    report["normalised"] = torch.equal(tiny.decode(latents), expected.decode(latents))
    tiny = read("lighttaew2_1.safetensors")
    raw = expected.decode(raw_latents(latents))
    report["raw"] = torch.allclose(tiny.decode(latents), raw, atol=1e-5)
    weights = {"decoder.1.weight": torch.zeros(4)}
    report["bad"] = read("taew2_1.safetensors") is None
    read()
    (folder / "taew2_1.safetensors").symlink_to(folder / "nowhere")
    folder_paths.filename_list_cache.clear()
    report["dangling"] = comfy_previews.read_decoder(cpu) is None
    report["notices"] = notices
    image = LinearPictures(comfy.latent_formats.Wan21())(torch.zeros(1, 16, 1, 6, 10))
    report["linear"] = image.size
    return report


page.send = receive
latent_preview.set_preview_method("auto")
comfy.utils.set_progress_bar_global_hook(progress)
with torch.inference_mode():
    answer = {"demo": run_of_demo(), "as_core": as_core(), "in_turn": in_turn()}
    answer["error"] = after_an_error()
    with tempfile.TemporaryDirectory() as folder:
        answer["files"] = files_of_decoders(Path(folder))
print(json.dumps(answer))
