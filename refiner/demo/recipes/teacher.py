"""The bidirectional teacher: flow matching on whole clips, sampled with many steps and guidance."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rollout import add_noise
from ...training.ahead import Ahead, helpers
from ...training.dmd import column, shifted, whole_flow
from ...training.learner import Learner, LearnerStage, noise_stream, stream, warm_root
from ...training.precision import for_training, mixed_precision
from ...training.replay import Replay
from ...wan.causal import CausalWan
from ...wan.transformer import WanConfig, WanTransformer
from ...wan.vae import WanVAE
from ..clips import held_out, show_clips, teacher_clips
from ..text_encoder import SpriteTextEncoder
from .data import Clips

WIDTHS = {
    128: dict(num_heads=1, ffn_dim=512, num_layers=4),
    256: dict(num_heads=8, ffn_dim=1024, num_layers=5),
}
TEXT_WAY = ("text_embedding.", "cross_attn.v.")  # not for Muon: no norm follows them


def sprite_config(width: int, text: SpriteTextEncoder) -> WanConfig:
    """Return the config of the demo's transformer of this width."""
    return WanConfig(dim=width, text_dim=text.text_dim, text_len=text.text_len, **WIDTHS[width])


@dataclass(frozen=True, slots=True)
class TeacherOptions:
    """Options of the recipe."""

    width: int = 256
    steps: int = 3300
    batch: int = 64  # whole clips, or as many shorter ones as have about the same frames in all
    # Up to a share of the steps, train on the clips' first latent frames: looks before motion.
    lengths: tuple[tuple[float, int], ...] = ((0.25, 3), (0.55, 9))
    learning_rate: float = 1e-3
    muon: float = 5e-2
    ema: float = 0.999
    shift: float = 5.0  # of the training noise levels; the VAE tolerates errors at low ones
    unsaid: float = 0.1  # share of clips without a prompt, for guidance
    shown: int = 32  # held-out captions of a sample sheet's scores
    seed: int = 0
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class LongerOptions(TeacherOptions):
    """Options of a finished teacher's second training: whole clips, at mid-training rates."""

    steps: int = 14000
    lengths: tuple[tuple[float, int], ...] = ()
    learning_rate: float = 4e-4
    muon: float = 2e-2


def twin(network: CausalWan) -> WanTransformer:
    """Return a trainable copy of a network's model."""
    model = WanTransformer(network.config)
    model.load_state_dict(network.model.state_dict())
    return model.to(next(network.model.parameters()).device)


class TeacherStage(LearnerStage):
    """Training state of the teacher: a new one, or a copy of `start`."""

    def __init__(
        self, options: TeacherOptions, clips: Clips, text: SpriteTextEncoder, vae: WanVAE,
        device: torch.device, start: CausalWan | None = None,
    ) -> None:  # fmt: skip
        self.options, self.device = options, device
        self.clips, self.text, self.vae = clips, text, vae
        if start:
            model = twin(start)
        else:
            model = new_model(sprite_config(options.width, text), options.seed).to(device)
        config = model.config
        self.learner = Learner(
            model, options.learning_rate, options.ema, decay=0.01, muon=options.muon,
            spared=TEXT_WAY,
        )  # fmt: skip
        self.network = for_training(CausalWan(model, config), device, options.compiled)
        self.average = replace(self.network, model=self.learner.average)
        self.replay = Replay(model, device)
        self.batches = Ahead(partial(teacher_batch, options, clips), options.steps, helpers(device))

    def step(self, index: int) -> dict[str, float]:
        options = self.options
        clean, prompts = self.batches(index)
        clean = clean.to(self.device).float()
        generator = noise_stream(self.device, options.seed, index, 1)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        u = torch.rand(len(clean), generator=generator, device=self.device)
        sigma = shifted(u, options.shift)
        with torch.no_grad():
            context = self.text(prompts)
        (loss,) = self.replay(self._loss, clean, noise, sigma, context)
        self.learner.update(index, warm_root(index, options.steps))
        return {"loss": loss.item()}

    def _loss(self, clean: Tensor, noise: Tensor, sigma: Tensor, context: Tensor) -> tuple[Tensor]:
        with mixed_precision(self.device):
            noisy = add_noise(clean, noise, column(sigma))
            flow = whole_flow(self.network, noisy, sigma, self.network.text(context))
        return (F.mse_loss(flow, noise - clean),)

    def show(self, folder: Path, index: int) -> dict[str, float]:
        """Draw and score held-out captions, with half the steps of a final sample."""
        captions = held_out(self.options.shown)
        clips = teacher_clips(self.average, self.text, self.vae, captions, steps=25)
        return show_clips(clips, captions, folder, index)


def new_model(config: WanConfig, seed: int) -> WanTransformer:
    """Create a model with random weights that predicts zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanTransformer(config)
    torch.nn.init.zeros_(model.head.head.weight)
    torch.nn.init.zeros_(model.head.head.bias)
    return model


def teacher_batch(options: TeacherOptions, clips: Clips, index: int) -> tuple[Tensor, list[str]]:
    """Draw a step's latents [B, 16, F, h, w], in bf16, and their prompts."""
    whole = clips.latents.shape[2]
    lengths = (length for share, length in options.lengths if index < share * options.steps)
    frames = next(lengths, whole)
    count = max(1, options.batch * whole // frames)
    return clips.batch(stream(options.seed, index, 0), count, options.unsaid, frames)
