"""Training of the sprites' text encoder to make all stated attributes linearly readable.

From the mean over words, and from each word of an object (so that attending to one word gives the
whole object) and of the ground.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...training.learner import Learner, LearnerStage, stream, warm_cosine
from ..captions import COLOUR_WORDS, GROUND_WORDS, RELATIONS, Caption, Stated, words
from ..motion import DIRECTIONS, RATES
from ..palette import GROUNDS, OBJECT_COLOURS
from ..shapes import SHAPES
from ..text_encoder import SpriteTextEncoder
from ..world import SIZES, sample_scene

# Questions about each of the two objects, and about the caption; answer 0 is "not stated".
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
    """Return the number of the right answer to each question about a caption."""
    nothing = Stated(None, None, None)
    objects = (*caption.objects, nothing)[:2]
    stated = [getattr(one, name) for one in objects for name in OF_OBJECT]
    stated += [caption.relation, caption.ground]
    return [
        0 if value is None else 1 + choices.index(value)
        for value, (_, choices) in zip(stated, QUESTIONS, strict=True)
    ]


GROUND, NOBODY = 2, -1  # owners of a word besides the two objects


def owners(caption: Caption, length: int) -> list[int]:
    """Return the owner of each word [length]: object 0 or 1, the ground, or nobody.

    An object owns the words up to the next object.
    """
    read = words(caption.text)
    owned, begins = [NOBODY] * len(read), []
    for one in caption.objects:
        colour = next(place for place, word in enumerate(read) if word in COLOUR_WORDS[one.colour])
        begins.append(colour - 1 - (one.size is not None))
    for number, start in enumerate(begins):
        end = begins[number + 1] if number + 1 < len(begins) else len(read)
        owned[start:end] = [number] * (end - start)
    if caption.ground:
        noun = next(place for place, word in enumerate(read) if word in GROUND_WORDS)
        two = " over " in caption.ground  # "on a ground of navy over brown", "on a navy ground"
        start, end = (noun - 2, noun + 5) if two else (noun - 3, noun + 1)
        owned[start:end] = [GROUND] * (end - start)
    return (owned + [NOBODY] * length)[:length]


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Options of the recipe, which takes minutes on a CPU."""

    dim: int = 128
    text_len: int = 32
    steps: int = 3000
    batch: int = 64
    learning_rate: float = 1e-3
    ema: float = 0.99
    seed: int = 0


class Reader(nn.Module):
    """The encoder with linear readouts of each attribute, which are discarded after training."""

    def __init__(self, options: TextOptions) -> None:
        super().__init__()
        self.encoder = SpriteTextEncoder(options.dim, options.text_len)
        self.heads = nn.ModuleList(
            nn.Linear(options.dim, 1 + len(choices)) for _, choices in QUESTIONS
        )
        self.of_word = nn.ModuleList(
            nn.Linear(options.dim, 1 + len(choices)) for choices in OF_OBJECT.values()
        )
        self.of_ground = nn.Linear(options.dim, 1 + len(GROUNDS))

    def ask(self, captions: list[Caption]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield each question's name, logits [N, answers] and right answers [N].

        First about captions, from the mean over their words, then about objects and the ground,
        from each of their words.
        """
        context = self.encoder([caption.text for caption in captions])
        right = torch.tensor([answers(caption) for caption in captions], device=context.device)
        lengths = (context.abs().sum(-1) > 0).sum(1, keepdim=True).clamp_min(1)
        pooled = context.sum(1) / lengths
        for number, (head, (name, _)) in enumerate(zip(self.heads, QUESTIONS, strict=True)):
            yield name, head(pooled), right[:, number]
        owned = torch.tensor(
            [owners(caption, context.shape[1]) for caption in captions], device=context.device
        )
        clip, word = ((owned == 0) | (owned == 1)).nonzero(as_tuple=True)
        first = len(OF_OBJECT) * owned[clip, word]
        for number, (head, name) in enumerate(zip(self.of_word, OF_OBJECT, strict=True)):
            yield f"word.{name}", head(context[clip, word]), right[clip, first + number]
        clip, word = (owned == GROUND).nonzero(as_tuple=True)
        if len(clip):
            yield "word.ground", self.of_ground(context[clip, word]), right[clip, -1]


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
        losses = [
            F.cross_entropy(logits, right) for _, logits, right in self.learner.model.ask(captions)
        ]
        loss = torch.stack(losses).mean()
        self.learner.step(loss, index, warm_cosine(index, self.options.steps))
        return {"loss": loss.item()}

    @torch.no_grad()
    def show(self, folder: Path, index: int) -> dict[str, float]:
        """Return the accuracy on held-out pairs; write it by question into the folder."""
        captions = [sample_scene(seed, "composition").caption for seed in range(256)]
        hits = {
            name: (logits.argmax(1) == right).float().mean().item()
            for name, logits, right in self.learner.average.ask(captions)
        }
        lines = [f"{name:<14}{100 * hit:6.2f}" for name, hit in hits.items()]
        (folder / f"answers_{index:06d}.txt").write_text("\n".join(lines) + "\n")
        return {"right": sum(hits.values()) / len(hits)}
