"""The sprites' text encoder: its output must tell every attribute that a caption states."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...training.learner import Learner, LearnerStage, stream, warm_cosine
from ..captions import RELATIONS, Caption, Stated
from ..motion import DIRECTIONS, RATES
from ..palette import GROUNDS, OBJECT_COLOURS
from ..shapes import SHAPES
from ..text_encoder import SpriteTextEncoder
from ..world import SIZES, sample_scene

# What each of the two objects has, and what the caption has once; the first answer is that it is not said.
OF_OBJECT: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(OBJECT_COLOURS),
    "motion": tuple(DIRECTIONS),
    "size": tuple(SIZES),
    "direction": tuple(dict.fromkeys(name for names in DIRECTIONS.values() for name in names)),
    "speed": tuple(dict.fromkeys(name for rates in RATES.values() for name in rates)),
}
OF_CAPTION: dict[str, tuple[str, ...]] = {"relation": RELATIONS, "ground": tuple(GROUNDS)}
QUESTIONS: list[tuple[str, tuple[str, ...]]] = [
    *((f"{place}.{name}", answers) for place in (0, 1) for name, answers in OF_OBJECT.items()),
    *OF_CAPTION.items(),
]


def answers(caption: Caption) -> list[int]:
    """The number of the right answer to each question about a caption."""
    nothing = Stated(None, None, None)
    objects = (*caption.objects, nothing)[:2]
    said = [getattr(one, name) for one in objects for name in OF_OBJECT] + [caption.relation, caption.ground]
    return [0 if one is None else 1 + choices.index(one) for one, (_, choices) in zip(said, QUESTIONS, strict=True)]


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Of the recipe; minutes on a CPU."""

    dim: int = 128
    text_len: int = 32
    steps: int = 3000
    batch: int = 64
    learning_rate: float = 1e-3
    ema: float = 0.99
    seed: int = 0


class Reader(nn.Module):
    """The encoder under a linear question for each attribute, which is thrown away after training."""

    def __init__(self, options: TextOptions) -> None:
        super().__init__()
        self.encoder = SpriteTextEncoder(options.dim, options.text_len)
        self.heads = nn.ModuleList(nn.Linear(options.dim, 1 + len(choices)) for _, choices in QUESTIONS)

    def forward(self, prompts: list[str]) -> list[Tensor]:
        """Logits [B, answers] of each question, from the mean over a caption's words."""
        context = self.encoder(prompts)
        lengths = (context.abs().sum(-1) > 0).sum(1, keepdim=True).clamp_min(1)
        pooled = context.sum(1) / lengths
        return [head(pooled) for head in self.heads]


class TextStage(LearnerStage):
    """Training state of the text encoder."""

    def __init__(self, options: TextOptions, device: torch.device) -> None:
        self.options, self.device = options, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = Reader(options).to(device)
        self.learner = Learner(model, options.learning_rate, options.ema)

    def step(self, index: int) -> dict[str, float]:
        seeds = stream(self.options.seed, index).integers(1 << 40, size=self.options.batch)
        captions = [sample_scene(int(seed)).caption for seed in seeds]
        logits = self.learner.model([caption.text for caption in captions])
        right = torch.tensor([answers(caption) for caption in captions], device=self.device)
        loss = sum(F.cross_entropy(each, right[:, number]) for number, each in enumerate(logits)) / len(logits)
        self.learner.step(loss, index, warm_cosine(index, self.options.steps))
        return {"loss": loss.item()}

    @torch.no_grad()
    def show(self, folder: Path, index: int) -> dict[str, float]:
        """Share of right answers on captions of held-out pairs; the table of every question goes into the folder."""
        captions = [sample_scene(seed, "composition").caption for seed in range(256)]
        right = torch.tensor([answers(caption) for caption in captions], device=self.device)
        logits = self.learner.average([caption.text for caption in captions])
        hits = torch.stack([each.argmax(1) == right[:, number] for number, each in enumerate(logits)]).float().mean(1)
        lines = [f"{name:<14}{100 * hit:6.2f}" for (name, _), hit in zip(QUESTIONS, hits.tolist(), strict=True)]
        (folder / f"answers_{index:06d}.txt").write_text("\n".join(lines) + "\n")
        return {"right": hits.mean().item()}
