"""NodeHost: the functions that nodes call on their surroundings."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...refiner.acceleration import Acceleration
from ...refiner.training.loop import Watch
from ...refiner.wan.causal import CausalWan
from ...refiner.wan.checkpoint import CheckpointInfo
from ...refiner.wan.vae import WanVAE
from ..guided import SamplerOptions
from ..run import ModelFacts, Run

# Values of sockets, whose classes are the host's own: nodes only pass them on.
Model: TypeAlias = Any
Clip: TypeAlias = Any
Vae: TypeAlias = Any
Video: TypeAlias = Any
Sampler: TypeAlias = Any
Ui: TypeAlias = Any  # `ui` of a NodeOutput


class NodeHost(Protocol):
    """Implemented by two modules, comfy.py and standalone.py.

    `folder` and `kind` name a subfolder of ComfyUI's models folder, such as diffusion_models.
    """

    # Files

    def list_files(self, folder: str) -> list[str]:
        """Names of the model files in a folder, for a widget's options."""
        ...

    def find_file(self, folder: str, name: str) -> Path:
        """Path of a file that `list_files` names; ValueError for any other name."""
        ...

    def list_folders(self, kind: str) -> list[str]:
        """Names of the models that are folders with a config.json."""
        ...

    def find_folder(self, kind: str, name: str) -> Path:
        """Path of a folder that `list_folders` names; ValueError for any other name."""
        ...

    def model_folder(self, folder: str) -> Path:
        """Return the folder for new model files; it need not exist."""
        ...

    def output_folder(self) -> Path:
        """Return the folder for results; it need not exist."""
        ...

    def output_path(self, prefix: str, suffix: str, width: int = 0, height: int = 0) -> Path:
        """An unused path PREFIX_00001_SUFFIX in the output folder, its parent folders created.

        Fills in %width%, %year% and the like. ValueError for a prefix that leaves the folder.
        """
        ...

    def graph_metadata(self, hidden: Any) -> dict[str, str]:
        """The running workflow as file metadata; `hidden` is the node class's own attribute."""
        ...

    # Models

    def load_model(self, path: Path, preset: str | None, dtype: str, weights: str) -> Model:
        """Load a MODEL; `dtype` and `weights` are choices of Load AR-VDM. ValueError for others."""
        ...

    def expected_dtype(self, info: CheckpointInfo, dtype: str) -> torch.dtype:
        """The dtype that `load_model` would compute in, known without loading."""
        ...

    def load_demo(self, network: str) -> tuple[Model, Clip, Vae]:
        """The bundled demo; `network` is student or teacher."""
        ...

    def accelerated(self, model: Model, acceleration: Acceleration) -> Model:
        """Return the MODEL with an acceleration of its runs."""
        ...

    def facts(self, model: Model) -> ModelFacts:
        """Describe a MODEL; ValueError unless it is Wan2.1 text-to-video."""
        ...

    def base_of(self, model: Model) -> str | None:
        """Fingerprint of a MODEL's unpatched weights; None where they cannot tell (quantised)."""
        ...

    def vae_width(self, vae: Vae) -> int:
        """Base width of a Wan2.1 VAE, 96 for the published one; ValueError for other VAEs."""
        ...

    # Sampling

    def settled(self, model: Model, run: Run) -> Run:
        """Choose the refiner's form where it is `auto`, by the memory that is free."""
        ...

    def sample(self, model: Model, positive: list, run: Run, vae: Vae | None = None) -> Tensor:
        """Sample raw VAE latents [B, 16, F, h, w]; with a VAE, a page plays them as they finish.

        `positive` is a CONDITIONING of one entry, or of the scenes of a Prompt Timeline.
        """
        ...

    def make_sampler(self, options: SamplerOptions) -> Sampler:
        """A SAMPLER for SamplerCustomAdvanced. ValueError where there is no ComfyUI."""
        ...

    def stops(self, node: str | None) -> int:
        """Count the runs of a node (by id) that were stopped early and must not be cached."""
        ...

    def encode(self, vae: Vae, images_FHWC: Tensor) -> Tensor:
        """Encode 1 + 4n frames in [0, 1] to raw latents [1, 16, 1 + n, h, w]; ValueError unless
        the VAE is Wan2.1's."""
        ...

    def decode(self, vae: Vae, raw_1CFhw: Tensor) -> Iterator[Tensor]:
        """Decode one clip piecewise: frames [f, H, W, 3] in [0, 1], fp32 on the CPU."""
        ...

    # Training

    def own_network(self, model: Model) -> CausalWan:
        """A frozen fp32 network with a MODEL's weights and LoRAs, usable under autograd."""
        ...

    def own_vae(self, vae: Vae) -> WanVAE:
        """A frozen fp32 VAE, usable under autograd. ValueError unless it is Wan2.1's."""
        ...

    def encode_prompt(self, clip: Clip, text: str) -> Tensor:
        """The prompt's context [1, L, text_dim], fp32 on the CPU."""
        ...

    def torch_device(self, nbytes: int = 0) -> torch.device:
        """Return the device for models; free `nbytes` there for one the host does not manage."""
        ...

    def training(self) -> AbstractContextManager[None]:
        """Enable gradients, with the host's own models off the device."""
        ...

    def train_watch(self, folder: Path, done: int, steps: int) -> AbstractContextManager[Watch]:
        """Report a training in `folder` that resumes at step `done`, also how it ended."""
        ...

    # Videos

    def video_file(self, path: Path) -> Video:
        """A VIDEO backed by a file."""
        ...

    def clip_size(self, clip: Tensor | Video) -> tuple[int, int, int]:
        """(frames, width, height) of an IMAGE or VIDEO, without decoding it."""
        ...

    def clip_frames(self, clip: Tensor | Video, fps: float) -> tuple[np.ndarray, float | Fraction]:
        """uint8 frames [F, H, W, 3] and their rate: a VIDEO's own, `fps` for an IMAGE."""
        ...

    # What the user sees

    def show(self, text: str) -> Ui:
        """Show a line of text on the running node; any text is safe."""
        ...

    def show_pair(
        self, base: np.ndarray, refined: np.ndarray, fps: float | Fraction, text: str
    ) -> Ui:
        """Play two clips of uint8 frames [F, H, W, 3], of equal size, under one slider."""
        ...

    def show_sheet(self, folder: Path, text: str) -> Ui:
        """Show the last sample sheet of the training in `folder`, and a line of text."""
        ...

    def show_video(self, path: Path) -> Ui:
        """Play a file of the output folder."""
        ...

    def notice(self, text: str) -> None:
        """Warn without failing: in the log, and on the node."""
        ...
