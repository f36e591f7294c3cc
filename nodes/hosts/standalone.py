"""NodeHost without ComfyUI: models in its folder layout, this machine's device, a progress bar."""

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...refiner.acceleration import Acceleration
from ...refiner.bundles import BUNDLES, DEMO
from ...refiner.device import pick_device, pick_dtype
from ...refiner.estimate import available_bytes
from ...refiner.files import unused_path
from ...refiner.generate import FPS
from ...refiner.noise.file import fingerprint
from ...refiner.rollout import Progress
from ...refiner.terminal import printable
from ...refiner.training.loop import Unwatched
from ...refiner.video import as_bytes, read_frames, video_rate, video_size
from ...refiner.wan.causal import CausalWan
from ...refiner.wan.checkpoint import CheckpointInfo, load_transformer, load_vae_state
from ...refiner.wan.text import load_text_encoder
from ...refiner.wan.vae import DecoderState, WanVAE, normalized, raw_latents
from ..accelerated import noting
from ..passes import Passes
from ..paths import SHOWN, dated, inside
from ..run import ModelFacts, Run, held_bytes
from ..scenes import context_of, placed_scenes
from ..sprites import sprite_file, sprite_preset
from . import schema as io

__all__ = ["io"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
FOLDERS = {
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
}
CHUNK = 3  # latent frames decoded together


@dataclass(frozen=True, slots=True)
class Place:
    """The surroundings of a workflow.

    `base` holds ComfyUI's folders models/ and input/; files are written into `outputs`; `prompt`
    is the workflow in API format.
    """

    base: Path = Path(".")
    outputs: Path = Path("output")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prompt: str = ""


_place = Place()


@contextmanager
def running_at(place: Place) -> Iterator[None]:
    """Let nodes run at a place, instead of in the current folder on the CPU."""
    global _place
    before, _place = _place, place
    try:
        yield
    finally:
        _place = before


def place_of(base: Path, outputs: Path | None, device: str, prompt: str = "") -> Place:
    """Check folders and device, and make a place of them. Raises ValueError."""
    if not base.is_dir():
        raise ValueError(
            f"base {base} is not a folder: give the one that holds models/ and input/, as ComfyUI's"
            " does"
        )
    outputs = outputs or base / "output"
    existing = next(path for path in (outputs, *outputs.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{outputs} is no folder that can be written: give another with --out")
    return Place(base, outputs, pick_device(device), prompt)


@dataclass(frozen=True, slots=True)
class Model:
    """A MODEL, with its preset's name."""

    network: CausalWan
    preset: str | None
    size: tuple[int, int] | None = None  # width and height that it was made for
    acceleration: Acceleration = field(default_factory=Acceleration)


@dataclass(frozen=True, slots=True)
class Clip:
    """A CLIP: a text encoder, and what it warns of in a prompt."""

    encode: Callable[[list[str]], Tensor]
    notes: Callable[[str], list[str]] = lambda text: []

    def context(self, text: str) -> Tensor:
        """Encode a prompt to [1, text_len, text_dim], fp32 on the CPU, with its warnings."""
        if lines := self.notes(text):
            notice("; ".join(lines))
        return self.encode([text]).float().cpu()


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A VIDEO: either `frames` [F, H, W, 3] in [0, 1], or the file at `path`."""

    fps: float | Fraction = FPS
    frames: Tensor | None = None
    path: Path | None = None


def _folders(folder: str) -> list[Path]:
    return [_place.base / "models" / name for name in FOLDERS.get(folder, (folder,))]


def list_files(folder: str) -> list[str]:
    """Weight files below the folder, as paths relative to it."""
    names = []
    for root in filter(Path.is_dir, _folders(folder)):
        paths = [path for path in sorted(root.rglob("*")) if path.suffix in SUFFIXES]
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return list(dict.fromkeys(names))


def find_file(folder: str, name: str) -> Path:
    if name not in list_files(folder):
        raise ValueError(f"{name!r} is not in {_folders(folder)[0]}: put the file there")
    return next(root / name for root in _folders(folder) if (root / name).is_file())


def list_folders(kind: str) -> list[str]:
    configs = [path for root in _folders(kind) for path in root.glob("*/config.json")]
    return sorted(path.parent.name for path in configs)


def find_folder(kind: str, name: str) -> Path:
    if name not in list_folders(kind):
        raise ValueError(f"{name!r} is not in {_folders(kind)[0]}: put the model's folder there")
    folders = [root / name for root in _folders(kind)]
    return next(folder for folder in folders if (folder / "config.json").is_file())


def model_folder(folder: str) -> Path:
    return _folders(folder)[0]


def load_model(path: Path, preset: str | None, dtype: str, weights: str) -> Model:
    if dtype.startswith("fp8"):
        raise ValueError(
            f"dtype {dtype} needs ComfyUI, which computes with such weights: use bf16 or auto"
        )
    device = _place.device
    torch_dtype = pick_dtype(dtype, device)
    model, info = load_transformer(path, dtype=torch_dtype, device=device, weights=weights)
    return Model(CausalWan(model, info.config), preset)


def expected_dtype(info: CheckpointInfo, dtype: str) -> torch.dtype:
    return pick_dtype(dtype, _place.device)


def load_demo(network: str) -> tuple[Model, Clip, WanVAE]:
    demo, device = BUNDLES[DEMO], _place.device
    preset = sprite_preset() if network == "student" else None
    model, info = load_transformer(sprite_file(network), dtype=torch.float32, device=device)
    clip = Clip(demo.text(device), demo.prompt_notes)
    vae = WanVAE.from_state_dict(load_vae_state(demo.vae)).to(device, torch.float32)
    network = CausalWan(model, info.config)
    return Model(network, preset, demo.size), clip, vae.requires_grad_(False)


def load_clip(path: Path) -> Clip:
    """Load a CLIP from a umT5 file in ComfyUI's format."""
    return Clip(load_text_encoder(path, device=_place.device).encode)


def load_vae(path: Path) -> WanVAE:
    """Load a VAE from a Wan2.1 file."""
    vae = WanVAE.from_state_dict(load_vae_state(path))
    return vae.to(_place.device, pick_dtype("auto", _place.device)).requires_grad_(False)


def facts(model: Model) -> ModelFacts:
    parameter = next(model.network.model.parameters())
    nbytes = available_bytes(parameter.device)
    return ModelFacts(
        model.network.config,
        parameter.dtype,
        model.preset,
        nbytes,
        device=parameter.device,
        size=model.size,
        acceleration=model.acceleration,
    )


def accelerated(model: Model, acceleration: Acceleration) -> Model:
    return replace(model, acceleration=acceleration)


def base_of(model: Model) -> str:
    return fingerprint(model.network.model)


def own_network(model: Model) -> CausalWan:
    """Share the MODEL's weights where they are fp32, else copy them."""
    network = model.network.model
    if next(network.parameters()).dtype != torch.float32:
        network = copy.deepcopy(network).float()
    return CausalWan(network.requires_grad_(False), model.network.config)


def own_vae(vae: WanVAE) -> WanVAE:
    """Share the VAE where it is fp32, else copy it."""
    is_fp32 = next(vae.parameters()).dtype == torch.float32
    return vae if is_fp32 else copy.deepcopy(vae).float()


def vae_width(vae: WanVAE) -> int:
    return vae.dim


def encode_prompt(clip: Clip, text: str) -> Tensor:
    return clip.context(text)


def torch_device(nbytes: int = 0) -> torch.device:
    """The place's device; nothing needs to be unloaded there."""
    return _place.device


def output_folder() -> Path:
    return _place.outputs


@contextmanager
def training() -> Iterator[None]:
    with torch.enable_grad():
        yield


@contextmanager
def train_watch(folder: Path, done: int, steps: int) -> Iterator[Unwatched]:
    """A watch that does nothing: the training prints its own bar."""
    yield Unwatched()


def show_sheet(folder: Path, text: str) -> list[Path]:
    """Return the last sample sheet, whose path the command prints."""
    show(text)
    return sorted(folder.glob("sheet_*.png"))[-1:]


def settled(model: Model, run: Run) -> Run:
    """Merge where a second copy of the layers fits."""
    if run.refined is None or run.refined.form != "auto":
        return run
    room = available_bytes(next(model.network.model.parameters()).device)
    return replace(run, refined=run.refined.chosen(merge=held_bytes(run, facts(model)) < room))


def sample(model: Model, positive: list, run: Run, vae: WanVAE | None = None) -> Tensor:
    placed = placed_scenes([options for _, options in positive], run)
    context = context_of([context for context, _ in positive], placed)
    parameter = next(model.network.model.parameters())
    passes = Passes(run)
    with tqdm(total=passes.total, unit="step", dynamic_ncols=True, file=sys.stderr) as bar:

        def step(progress: Progress) -> None:
            passes.step(progress)
            level = progress.chunk.levels[progress.level].step
            bar.set_postfix_str(
                f"chunk {progress.chunk.index + 1}/{progress.chunks}, level {level}"
            )
            bar.update(passes.done - bar.n)

        prompts = placed.timeline if placed else None
        device, dtype = parameter.device, parameter.dtype
        with noting(
            model.acceleration, run.plan.memory(model.network.config, dtype), device, notice
        ):
            clip = run.clip(
                model.network, context, device, dtype, step, prompts=prompts,
                acceleration=model.acceleration,
            )  # fmt: skip
    return raw_latents(clip)


def stops(node: str | None) -> int:
    """0, as there is no page that could stop a run."""
    return 0


def make_sampler(options: object) -> None:
    raise ValueError(
        "a SAMPLER needs ComfyUI: use the Pathwise Refined Sampler, which also runs without it"
    )


@torch.no_grad()
def encode(vae: WanVAE, images_FHWC: Tensor) -> Tensor:
    """Encode frames in [0, 1] to raw latents [1, 16, f, h, w]."""
    weight = next(vae.parameters())
    pixels = images_FHWC[..., :3].permute(3, 0, 1, 2)[None].to(weight) * 2 - 1
    return raw_latents(vae.encode(pixels)).float().cpu()


def stream_decoder(vae: WanVAE) -> Callable[[Tensor], Tensor]:
    """Begin to decode one clip: a function of the raw latents [1, 16, f, h, w] of the next chunk.

    It returns their frames [F, H, W, 3] in [0, 1], fp32 on the CPU.
    """
    state, weight = DecoderState(), next(vae.parameters())

    @torch.no_grad()
    def decode_next(raw_1CFhw: Tensor) -> Tensor:
        pixels = vae.decode(normalized(raw_1CFhw).to(weight), state)
        return ((pixels[0].permute(1, 2, 3, 0).float() + 1) / 2).clamp(0, 1).cpu()

    return decode_next


def decode(vae: WanVAE, raw_1CFhw: Tensor) -> Iterator[Tensor]:
    """Decode CHUNK latent frames at a time."""
    yield from map(stream_decoder(vae), raw_1CFhw.split(CHUNK, dim=2))


def input_path(name: str) -> Path:
    """A file of the input folder, or of the folder named at the end, like `name [output]`."""
    bare, _, ending = name.rpartition(" [")
    folders = {
        "input]": _place.base / "input",
        "output]": _place.outputs,
        "temp]": _place.base / "temp",
    }
    if ending not in folders or not bare:
        bare, ending = name, "input]"
    path = inside(folders[ending], bare, "input")
    if not path.is_file():
        raise ValueError(f"{bare[:SHOWN]!r} is not in {folders[ending]}: put the file there")
    return path


def output_path(prefix: str, suffix: str, width: int = 0, height: int = 0) -> Path:
    """Count on from all files of the prefix, those of interrupted runs included."""
    name = dated(prefix, width, height, time.localtime())
    stem = inside(_place.outputs, name, "filename_prefix")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        return unused_path(stem.parent, stem.name, suffix)
    except OSError as error:
        shown = prefix if len(prefix) <= SHOWN else f"{prefix[:SHOWN]}…"
        raise ValueError(
            f"filename_prefix {shown!r} cannot be written ({error.strerror}): give another"
        ) from error


def graph_metadata(hidden: object = None) -> dict[str, str]:
    return {"prompt": _place.prompt} if _place.prompt else {}


def video_file(path: Path) -> VideoFile:
    return VideoFile(video_rate(path), path=path)


def clip_size(clip: Tensor | VideoFile) -> tuple[int, int, int]:
    if isinstance(clip, VideoFile) and clip.path is not None:
        return video_size(clip.path)
    images = clip.frames if isinstance(clip, VideoFile) else clip
    frames, height, width = images.shape[:3]
    return frames, width, height


def clip_frames(clip: Tensor | VideoFile, fps: float) -> tuple[np.ndarray, float | Fraction]:
    if not isinstance(clip, VideoFile):
        return as_bytes(clip), fps
    frames = read_frames(clip.path) if clip.frames is None else as_bytes(clip.frames)
    return frames, clip.fps


def show_pair(base: np.ndarray, refined: np.ndarray, fps: float | Fraction, text: str) -> str:
    """Print the text; the clips need a page."""
    return show(text)


def show(text: str) -> str:
    notice(text)
    return text


def show_video(path: Path) -> Path:
    """Return the path, which the command prints."""
    return path


def notice(text: str) -> None:
    tqdm.write(printable(f"autorefiner: {text}"), file=sys.stderr)
