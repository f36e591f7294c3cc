"""Training in ComfyUI: copies of models, free memory, and progress on the page."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management as management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...refiner.wan.causal import CausalWan
from ...refiner.wan.transformer import WanTransformer
from ...refiner.wan.vae import WanVAE
from ..curves import Curves
from ..run_states import DONE, FAILED, INTERRUPTED, RunState
from . import comfy_layers, page
from .comfy_model import facts, network_of
from .comfy_video import wan_vae

TRAIN = "autorefiner.train"  # the event, which web/trainer.js listens to
SECONDS = 0.5  # between two events of a training


def list_folders(kind: str) -> list[str]:
    return sorted(_folders(kind))


def find_folder(kind: str, name: str) -> Path:
    folders = _folders(kind)
    if name not in folders:
        raise ValueError(
            f"{name!r} is not in models/{kind}: put the model's folder there and refresh"
        )
    return folders[name]


def _folders(kind: str) -> dict[str, Path]:
    default = os.path.join(folder_paths.models_dir, kind)
    folder_paths.add_model_folder_path(kind, default, is_default=True)
    roots = [Path(root) for root in folder_paths.get_folder_paths(kind)]
    configs = [path for root in reversed(roots) for path in root.glob("*/config.json")]
    return {path.parent.name: path.parent for path in configs}


def torch_device(nbytes: int = 0) -> torch.device:
    """Return the device of models; unload ComfyUI's models there until `nbytes` are free."""
    device = management.get_torch_device()
    if nbytes and not management.is_device_cpu(device):
        management.free_memory(nbytes + management.minimum_inference_memory(), device)
    return device


@contextmanager
def training() -> Iterator[None]:
    """Leave inference mode with an empty device; free the training's memory afterwards."""
    management.unload_all_models()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        management.soft_empty_cache()


def own_network(model: ModelPatcher) -> CausalWan:
    """Copy a MODEL's network to its device, frozen, in fp32, with its LoRAs merged."""
    network, config, device = network_of(model), facts(model).config, model.load_device
    with torch.inference_mode():  # LoRAs are merged in place into tensors of that mode
        management.load_models_gpu([model])
    read, state = comfy_layers.weights_on(device, torch.float32), {}
    for name, module in network.named_modules():
        if hasattr(module, "comfy_cast_weights") and module.weight is not None:
            weight, bias = read(module)
            state |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
    with torch.device("meta"):
        transformer = WanTransformer(config)
    for name in transformer.state_dict().keys() - state.keys():
        state[name] = network.get_parameter(name).to(device, torch.float32, copy=True)
    transformer.load_state_dict(
        {name: state[name] for name in transformer.state_dict()}, assign=True
    )
    with torch.inference_mode():
        management.unload_all_models()
    return CausalWan(transformer.eval().requires_grad_(False), config)


def own_vae(vae: comfy.sd.VAE) -> WanVAE:
    device = torch_device()
    copies = {
        name: tensor.to(device, torch.float32, copy=True)
        for name, tensor in wan_vae(vae).state_dict().items()
    }
    return WanVAE.from_state_dict(copies).requires_grad_(False)


def encode_prompt(clip: comfy.sd.CLIP, text: str) -> Tensor:
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text)).float().cpu()


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory())


def placed(path: Path) -> dict[str, str]:
    """Return the page's address of a file in the output folder."""
    subfolder = os.path.relpath(path.parent, output_folder()).replace(os.sep, "/")
    return {"filename": path.name, "subfolder": subfolder, "type": "output"}


def sheets_of(folder: Path) -> list[Path]:
    """List the sample sheets of a run, oldest first."""
    return sorted(folder.glob("sheet_*.png"))


def show_sheet(folder: Path, text: str) -> dict:
    sheets = [placed(path) for path in sheets_of(folder)[-1:]]
    return {"autorefiner_sheet": sheets, **page.show(text).as_dict()}


@dataclass(slots=True)
class TrainWatch:
    """Watch of a training in `folder`: progress bar, interrupts, and events for the page."""

    folder: Path
    steps: int
    curves: Curves
    state: RunState | None  # None outside a prompt
    bar: comfy.utils.ProgressBar
    begun: float = field(default_factory=time.perf_counter)
    sent: float = 0.0
    first: int = 0  # the step that it resumed at
    done: int = 0
    picture: dict | None = None

    def report(self, done: int) -> None:
        """Show the steps taken; raise ComfyUI's exception when the user interrupts."""
        management.throw_exception_if_processing_interrupted()
        self.done = done
        self.bar.update_absolute(done, self.steps)
        if time.perf_counter() > self.sent + SECONDS:
            self.send({})

    def add(self, index: int, figures: Mapping[str, float]) -> None:
        self.curves.add(index, figures)

    def sheet(self, path: Path) -> None:
        """Show a sample sheet on the node."""
        self.picture = placed(path)
        self.send({})

    def send(self, update: dict) -> None:
        """Send the training's state, with an update, to the page that queued it."""
        self.sent = time.perf_counter()
        if self.state is None:
            return
        state = {
            "step": self.done,
            "first": self.first,
            "steps": self.steps,
            "elapsed": self.sent - self.begun,
            "curves": self.curves.points(),
            "sheet": self.picture,
        }
        page.send(TRAIN, self.state, {**state, **update})


@contextmanager
def train_watch(folder: Path, done: int, steps: int) -> Iterator[TrainWatch]:
    """The watch of the running node; it reports on the page how the training ended."""
    node, prompt = page.this_run()
    state = page.begin_state(node, prompt) if node and prompt else None
    curves = Curves.read(folder / "log.jsonl", done)
    watch = TrainWatch(folder, steps, curves, state, comfy.utils.ProgressBar(steps))
    watch.first = watch.done = done
    for path in sheets_of(folder)[-1:]:
        watch.sheet(path)
    status = FAILED
    try:
        yield watch
        status = DONE
    except management.InterruptProcessingException:
        status = INTERRUPTED
        raise
    finally:
        watch.send({"status": status})
