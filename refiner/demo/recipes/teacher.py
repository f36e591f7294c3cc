"""The bidirectional teacher: flow matching on whole clips, sampled with many steps and guidance."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory.whole import WholeClip
from ...rollout import add_noise
from ...training.dmd import column, shifted, whole_flow
from ...video import contact_sheet, to_frames
from ...wan.causal import CausalWan
from ...wan.transformer import WanConfig, WanTransformer
from ...wan.vae import WanVAE
from ..text_encoder import SpriteTextEncoder
from ..world import sample_scene
from .data import Clips
from .parts import Learner, LearnerStage, noise_stream, stream, warm_cosine

WIDTHS = {128: dict(num_heads=4, ffn_dim=512, num_layers=8), 256: dict(num_heads=2, ffn_dim=1024, num_layers=5)}


def sprite_config(width: int, text: SpriteTextEncoder) -> WanConfig:
    """Sizes of the demo's transformers."""
    return WanConfig(dim=width, text_dim=text.text_dim, text_len=text.text_len, **WIDTHS[width])


@dataclass(frozen=True, slots=True)
class TeacherOptions:
    """Of the recipe."""

    width: int = 128
    steps: int = 20000
    batch: int = 16
    learning_rate: float = 1e-3
    ema: float = 0.999
    shift: float = 3.0  # of the training noise levels
    unsaid: float = 0.1  # share of clips without a prompt, for guidance
    seed: int = 0


class TeacherStage(LearnerStage):
    """Training state of the teacher."""

    def __init__(
        self, options: TeacherOptions, clips: Clips, text: SpriteTextEncoder, vae: WanVAE, device: torch.device
    ) -> None:
        self.options, self.clips, self.text, self.vae, self.device = options, clips, text, vae, device
        config = sprite_config(options.width, text)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = WanTransformer(config).to(device)
        torch.nn.init.zeros_(model.head.head.weight)
        torch.nn.init.zeros_(model.head.head.bias)
        self.learner = Learner(model, options.learning_rate, options.ema, decay=0.01)
        self.network, self.average = CausalWan(model, config), CausalWan(self.learner.average, config)

    def step(self, index: int) -> dict[str, float]:
        options = self.options
        clean, prompts = self.clips.batch(stream(options.seed, index, 0), options.batch, options.unsaid)
        clean = clean.to(self.device)
        generator = noise_stream(self.device, options.seed, index, 1)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        sigma = shifted(torch.rand(len(clean), generator=generator, device=self.device), options.shift)
        with torch.no_grad():
            context = self.text(prompts)
        flow = whole_flow(self.network, add_noise(clean, noise, column(sigma)), sigma, self.network.text(context))
        loss = F.mse_loss(flow, noise - clean)
        self.learner.step(loss, index, warm_cosine(index, options.steps))
        return {"loss": loss.item()}

    def show(self, folder: Path, index: int) -> dict[str, float]:
        """A sheet of four held-out captions, eight frames each."""
        captions = [sample_scene(seed, "test").caption.text for seed in range(4)]
        latents = sample_teacher(self.average, self.text, captions, frames=21, steps=25)
        write_sheet(self.vae, latents, folder / f"sheet_{index:06d}.png")
        (folder / f"sheet_{index:06d}.txt").write_text("\n".join(captions) + "\n")
        return {}


@torch.no_grad()
def sample_teacher(
    network: CausalWan, text: SpriteTextEncoder, prompts: Sequence[str], frames: int, *, steps: int = 50,
    guidance: float = 3.0, shift: float = 5.0, seed: int = 0, size: tuple[int, int] = (8, 8),
) -> Tensor:  # fmt: skip
    """Whole clips [B, 16, F, h, w] by Euler steps along the guided flow, `uncond + (1 + w) (cond − uncond)`."""
    device = next(network.model.parameters()).device
    generator = noise_stream(device, seed)
    x = torch.randn(len(prompts), network.config.in_dim, frames, *size, generator=generator, device=device)
    texts = [network.text(text([*prompts])), network.text(text([""] * len(prompts)))]
    sigmas = shifted(torch.linspace(1, 0, steps + 1), shift).tolist()
    for sigma, below in pairwise(sigmas):
        t = torch.full((1, 1), 1000 * sigma, dtype=torch.float64)
        with_prompt, without = (network(x, t, each, WholeClip(frames)) for each in texts)
        x = x + (below - sigma) * (with_prompt + guidance * (with_prompt - without))
    return x


@torch.no_grad()
def write_sheet(vae: WanVAE, latents: Tensor, path: Path) -> None:
    """A row of eight frames for each clip of latents [B, 16, F, h, w]."""
    shown = []
    for clip in latents.split(1):
        frames = to_frames(vae.decode(clip))
        shown += [*frames[:: max(1, len(frames) // 7)][:8]]
    contact_sheet(shown, path)
