"""The nodes' surroundings without ComfyUI: models and folders in its layout, this machine's device, a progress bar."""

import copy
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...refiner.demo import bundle
from ...refiner.demo.captions import misread
from ...refiner.estimate import available_bytes
from ...refiner.files import unused_path
from ...refiner.generate import FPS, pick_device, pick_dtype
from ...refiner.noise.file import fingerprint
from ...refiner.rollout import Progress
from ...refiner.terminal import printable
from ...refiner.training.loop import Unwatched
from ...refiner.video import as_bytes, read_frames, video_rate, video_size
from ...refiner.wan.causal import CausalWan
from ...refiner.wan.checkpoint import CheckpointInfo, load_transformer, load_vae_state
from ...refiner.wan.text import load_text_encoder
from ...refiner.wan.vae import DecoderState, WanVAE
from ..passes import Passes
from ..paths import SHOWN, dated, inside
from ..run import ModelFacts, Run, held_bytes, normalized, raw_latents
from ..sprites import sprite_preset
from . import schema as io

__all__ = ["io"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
FOLDERS = {"diffusion_models": ("diffusion_models", "unet"), "text_encoders": ("text_encoders", "clip")}
CHUNK = 3  # latent frames decoded at once


@dataclass(frozen=True, slots=True)
class Place:
    """Where a workflow runs: ComfyUI's folders `models` and `input` under `base`, the folder that it writes into, and
    the workflow itself in API format."""

    base: Path = Path(".")
    outputs: Path = Path("output")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prompt: str = ""


_place = Place()


@contextmanager
def running_at(place: Place) -> Iterator[None]:
    """Let nodes run at a place."""
    global _place
    before, _place = _place, place
    try:
        yield
    finally:
        _place = before


def place_of(base: Path, outputs: Path | None, device: str, prompt: str = "") -> Place:
    """A place under `base`; ValueError when one of them, or the device, is not here or of no use."""
    if not base.is_dir():
        raise ValueError(f"base {base} is not a folder: give the one that holds models/ and input/, as ComfyUI's does")
    outputs = outputs or base / "output"
    there = next(folder for folder in (outputs, *outputs.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{outputs} is no folder that can be written: give another with --out")
    return Place(base, outputs, pick_device(device), prompt)


@dataclass(frozen=True, slots=True)
class Model:
    """A MODEL: the network, and the name of its preset."""

    network: CausalWan
    preset: str | None


@dataclass(frozen=True, slots=True)
class Clip:
    """A CLIP: a text encoder, called with prompts, and whether it only knows the sprites' words."""

    encode: nn.Module
    sprites: bool

    def context(self, text: str) -> Tensor:
        """[1, text_len, text_dim] of a prompt, fp32 on the CPU."""
        if self.sprites and (told := misread(text)):
            notice("; ".join(told))
        return self.encode([text]).float().cpu()


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A VIDEO: frames [F, H, W, 3] in [0, 1] or the file that holds them, and their rate."""

    fps: float | Fraction = FPS
    frames: Tensor | None = None
    path: Path | None = None


def _folders(folder: str) -> list[Path]:
    return [_place.base / "models" / name for name in FOLDERS.get(folder, (folder,))]


def list_files(folder: str) -> list[str]:
    """Weight files under models/`folder`, as paths inside it."""
    found = {}
    for root in _folders(folder):
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            if path.suffix in SUFFIXES and path.is_file():
                found.setdefault(path.relative_to(root).as_posix(), path)
    return list(found)


def find_file(folder: str, name: str) -> Path:
    """A file by the name that `list_files` gives it; ValueError for any other."""
    if name not in list_files(folder):
        raise ValueError(f"{name!r} is not in {_folders(folder)[0]}: put the file there")
    return next(root / name for root in _folders(folder) if (root / name).is_file())


def list_folders(kind: str) -> list[str]:
    """Names of the models in models/`kind` that are folders."""
    return sorted(path.parent.name for root in _folders(kind) for path in root.glob("*/config.json"))


def find_folder(kind: str, name: str) -> Path:
    """A folder by the name that `list_folders` gives it; ValueError for any other."""
    if name not in list_folders(kind):
        raise ValueError(f"{name!r} is not in {_folders(kind)[0]}: put the model's folder there")
    return next(root / name for root in _folders(kind) if (root / name / "config.json").is_file())


def model_folder(folder: str) -> Path:
    """Where new files of a kind are written."""
    return _folders(folder)[0]


def load_model(path: Path, preset: str | None, dtype: str, weights: str) -> Model:
    """A MODEL of a file, in a dtype of Load AR-VDM's."""
    if dtype.startswith("fp8"):
        raise ValueError(f"dtype {dtype} needs ComfyUI, which computes with such weights: use bf16 or auto")
    device = _place.device
    model, info = load_transformer(path, dtype=pick_dtype(dtype, device), device=device, weights=weights)
    return Model(CausalWan(model, info.config), preset)


def expected_dtype(info: CheckpointInfo, dtype: str) -> torch.dtype:
    """What a model of this file will compute in."""
    return pick_dtype(dtype, _place.device)


def load_demo(network: str) -> tuple[Model, Clip, WanVAE]:
    """The bundle with its student or teacher, in fp32."""
    folder, device = bundle.WEIGHTS, _place.device
    preset = sprite_preset() if network == "student" else None
    model = Model(bundle.load_sprite_network(network, folder, device), preset)
    text = bundle.load_sprite_text(folder).to(device)
    return model, Clip(text, sprites=True), bundle.load_sprite_vae(folder).to(device)


def load_clip(path: Path) -> Clip:
    """A CLIP of a umT5 file as ComfyUI takes it."""
    return Clip(load_text_encoder(path, device=_place.device).encode, sprites=False)


def load_vae(path: Path) -> WanVAE:
    """A VAE of a Wan2.1 file."""
    vae = WanVAE.from_state_dict(load_vae_state(path))
    return vae.to(_place.device, pick_dtype("auto", _place.device)).requires_grad_(False)


def facts(model: Model) -> ModelFacts:
    """What a MODEL is."""
    parameter = next(model.network.model.parameters())
    return ModelFacts(model.network.config, parameter.dtype, model.preset, available_bytes(parameter.device))


def base_of(model: Model) -> str:
    """The fingerprint of a MODEL's own weights, by which a refiner knows its base."""
    return fingerprint(model.network.model)


def own_network(model: Model) -> CausalWan:
    """A frozen fp32 network with the weights of a MODEL, to train with; the MODEL's own where they are fp32."""
    network = model.network.model
    if next(network.parameters()).dtype != torch.float32:
        network = copy.deepcopy(network).float()
    return CausalWan(network.requires_grad_(False), model.network.config)


def own_vae(vae: WanVAE) -> WanVAE:
    """The same of a VAE."""
    return vae if next(vae.parameters()).dtype == torch.float32 else copy.deepcopy(vae).float()


def vae_width(vae: WanVAE) -> int:
    """The base width of a VAE, 96 for the published one."""
    return vae.dim


def encode_prompt(clip: Clip, text: str) -> Tensor:
    """The context [1, L, text_dim] of a prompt, fp32 on the CPU."""
    return clip.context(text)


def torch_device(nbytes: int = 0) -> torch.device:
    """Where models run; nothing else keeps `nbytes` from being free there."""
    return _place.device


def output_folder() -> Path:
    """Where what is made lies."""
    return _place.outputs


@contextmanager
def training() -> Iterator[None]:
    """Gradients may be needed."""
    with torch.enable_grad():
        yield


@contextmanager
def train_watch(folder: Path, done: int, steps: int) -> Iterator[Unwatched]:
    """The watch of a training, which prints its own bar."""
    yield Unwatched()


def show_sheet(folder: Path, text: str) -> list[Path]:
    """A line, and the training's last sample sheet, for the command to name."""
    show(text)
    return sorted(folder.glob("sheet_*.png"))[-1:]


def settled(model: Model, run: Run) -> Run:
    """The run with its refiner merged or in branches: merged where there is memory for a second copy."""
    if run.refined is None or run.refined.form != "auto":
        return run
    room = available_bytes(next(model.network.model.parameters()).device)
    return replace(run, refined=run.refined.chosen(merge=held_bytes(run, facts(model)) < room))


def sample(model: Model, positive: list, run: Run) -> Tensor:
    """The raw latents [B, C, F, h, w] of a run; `positive` is a CONDITIONING of one entry."""
    if len(positive) != 1:
        raise ValueError(f"positive has {len(positive)} entries: the models take one prompt, so connect one")
    parameter = next(model.network.model.parameters())
    passes = Passes(run)
    with tqdm(total=passes.total, unit="step", dynamic_ncols=True, file=sys.stderr) as bar:

        def step(progress: Progress) -> None:
            passes.step(progress)
            level = progress.chunk.levels[progress.level].step
            bar.set_postfix_str(f"chunk {progress.chunk.index + 1}/{progress.chunks}, level {level}")
            bar.update(passes.done - bar.n)

        clip = run.clip(model.network, positive[0][0], parameter.device, parameter.dtype, step)
    return raw_latents(clip)


def stops(node: str | None) -> int:
    """Runs of a node that the page stopped: there is no page."""
    return 0


def make_sampler(options: object) -> None:
    """A SAMPLER is ComfyUI's, so there is none here."""
    raise ValueError("a SAMPLER needs ComfyUI: use the Pathwise Refined Sampler, which also runs without it")


@torch.no_grad()
def encode(vae: WanVAE, images_FHWC: Tensor) -> Tensor:
    """Raw latents [1, 16, f, h, w] of frames in [0, 1]."""
    weight = next(vae.parameters())
    pixels = images_FHWC[..., :3].permute(3, 0, 1, 2)[None].to(weight) * 2 - 1
    return raw_latents(vae.encode(pixels)).float().cpu()


@torch.no_grad()
def decode(vae: WanVAE, raw_1CFhw: Tensor) -> Iterator[Tensor]:
    """Frames [f, H, W, 3] in [0, 1], fp32 on the CPU, a few latents at a time."""
    state, weight = DecoderState(), next(vae.parameters())
    for piece in normalized(raw_1CFhw).split(CHUNK, dim=2):
        pixels = vae.decode(piece.to(weight), state)
        yield ((pixels[0].permute(1, 2, 3, 0).float() + 1) / 2).clamp(0, 1).cpu()


def input_path(name: str) -> Path:
    """A file of the input folder, or of another that the name ends with as ComfyUI's do: `name [output]`."""
    bare, _, ending = name.rpartition(" [")
    folders = {"input]": _place.base / "input", "output]": _place.outputs, "temp]": _place.base / "temp"}
    if ending not in folders or not bare:
        bare, ending = name, "input]"
    path = inside(folders[ending], bare, "input")
    if not path.is_file():
        raise ValueError(f"{bare[:SHOWN]!r} is not in {folders[ending]}: put the file there")
    return path


def output_path(prefix: str, suffix: str, width: int = 0, height: int = 0) -> Path:
    """A new path in the output folder: PREFIX_00001_.mp4, counted on, also behind what an interrupted run left.

    %year%, %width% and the like in the prefix are said as ComfyUI says them.
    """
    stem = inside(_place.outputs, dated(prefix, width, height, time.localtime()), "filename_prefix")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        return unused_path(stem.parent, stem.name, suffix)
    except OSError as error:
        name = prefix if len(prefix) <= SHOWN else f"{prefix[:SHOWN]}…"
        raise ValueError(f"filename_prefix {name!r} cannot be written ({error.strerror}): give another") from error


def graph_metadata(hidden: object = None) -> dict[str, str]:
    """The workflow that runs, as ComfyUI puts it into a file."""
    return {"prompt": _place.prompt} if _place.prompt else {}


def video_file(path: Path) -> VideoFile:
    """A VIDEO of a file."""
    return VideoFile(video_rate(path), path=path)


def clip_size(clip: Tensor | VideoFile) -> tuple[int, int, int]:
    """(frames, width, height) of IMAGE or VIDEO, without reading more than it takes."""
    if isinstance(clip, VideoFile) and clip.path is not None:
        return video_size(clip.path)
    frames, height, width = (clip.frames if isinstance(clip, VideoFile) else clip).shape[:3]
    return frames, width, height


def clip_frames(clip: Tensor | VideoFile, fps: float) -> tuple[np.ndarray, float | Fraction]:
    """uint8 frames [F, H, W, 3] of IMAGE or VIDEO, and their rate: `fps`, unless a VIDEO brings its own."""
    if not isinstance(clip, VideoFile):
        return as_bytes(clip), fps
    return read_frames(clip.path) if clip.frames is None else as_bytes(clip.frames), clip.fps


def show_pair(base: np.ndarray, refined: np.ndarray, fps: float | Fraction, text: str) -> str:
    """What a page would show of two clips: there is none, so only the line of text."""
    return show(text)


def show(text: str) -> str:
    """What a page would show on the node."""
    notice(text)
    return text


def show_video(path: Path) -> Path:
    """What was written, for the command to name."""
    return path


def notice(text: str) -> None:
    """Something to know that is no error."""
    tqdm.write(printable(f"autorefiner: {text}"), file=sys.stderr)
