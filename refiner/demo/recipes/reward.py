"""Training of the sprites' text-video reward: contrast against clips that differ in one attribute.

Where the student's failures are known, they are false clips of their captions, too.

The contrastive loss learns slowly at first, so a linear layer, discarded after training, also
reads every fact of the scene from both embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn

from ...training.ahead import Ahead, helpers
from ...training.learner import Learner, LearnerStage, noise_stream, stream, warm_cosine
from ...training.precision import mixed_precision
from ..captions import Caption, write
from ..motion import FPS
from ..render import render_at
from ..reward_model import FRAMES, SpriteVideoText
from ..scene import Scene
from ..world import sample_scene
from .contradict import changed, draw_change, twin
from .facts import FACTS, facts_of
from .failures import Failures

SIZE = 64
VISIBLE = frozenset({"shape", "colour", "motion", "size", "speed", "direction", "ground"})
ATTRIBUTES = ("shape", "colour", "motion", "size", "speed", "direction", "relation", "ground")
SHARPEST = 100.0  # largest inverse temperature
RARE = -3.0  # initial log-odds of a fact
STRETCH = 10.0  # factor on unit vectors before facts are read from them


@dataclass(frozen=True, slots=True)
class RewardOptions:
    """Options of the recipe. A step takes `batch` scenes, and of each a twin.

    A twin differs in one attribute. A share `failed` of the scenes are ones that the student failed
    at, with its clip.
    """

    steps: int = 2500
    batch: int = 32
    learning_rate: float = 1e-3
    ema: float = 0.998
    longest: int = 161  # frames of the video that a clip is taken from
    noise: float = 0.06  # largest noise on frames in 0–1
    blur: float = 0.7  # largest share of a 3x3 blur
    failed: float = 0.5
    shown: int = 256  # held-out clips to score
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips with a true and a false caption each."""

    frames: Tensor  # [B, F, 3, H, W] in 0–1
    numbers: Tensor  # [B, F], the frames' indices
    true: list[str]
    false: list[str]
    seen: tuple[Tensor, Tensor]  # facts that hold and are known of each clip [B, len(FACTS)]
    said: tuple[Tensor, Tensor]  # the same of each true caption
    failed: Tensor | None = None  # frames [K, F, 3, H, W] in 0–1 of the last K scenes, failed


class Reader(nn.Module):
    """The model with a linear readout of each fact."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SpriteVideoText()
        self.facts = nn.Linear(self.model.from_video.out_features, len(FACTS))
        nn.init.constant_(self.facts.bias, RARE)

    def loss_of_facts(self, vectors: Tensor, facts: tuple[Tensor, Tensor]) -> Tensor:
        """Return a tenth of the known facts' cross-entropy, summed over facts."""
        holds, known = (tensor.to(vectors.device) for tensor in facts)
        logits = self.facts(STRETCH * vectors).float()
        entropy = F.binary_cross_entropy_with_logits(logits, holds, known, reduction="sum")
        return 0.1 * entropy / len(vectors)


class RewardStage(LearnerStage):
    """Training state of the reward model."""

    def __init__(
        self, options: RewardOptions, device: torch.device, failures: Failures | None = None
    ) -> None:
        self.options, self.device = options, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            reader = Reader().to(device)
        self.learner = Learner(reader, options.learning_rate, options.ema, decay=0.01)
        batch = partial(make_batch, options, failures)
        self.batches = Ahead(batch, options.steps, helpers(device))

    def step(self, index: int) -> dict[str, float]:
        options = self.options
        batch = self.batches(index)
        generator = noise_stream(self.device, options.seed, index, 1)
        frames, numbers = batch.frames, batch.numbers
        count = len(frames)
        if batch.failed is not None:
            frames = torch.cat((frames, batch.failed))
            numbers = torch.cat((numbers, numbers[-2 * len(batch.failed) :: 2]))
        frames = worn(frames.to(self.device), options, generator)
        reader, model = self.learner.model, self.learner.model.model
        with mixed_precision(self.device):
            whole = model.embed_video(frames, numbers.to(self.device))
            video = whole[:count]
            text = model.embed_text(batch.true + batch.false)
            of_video = reader.loss_of_facts(video, batch.seen)
            facts = of_video + reader.loss_of_facts(text[: len(video)], batch.said)
        logits = model.sharpness.exp().clamp(max=SHARPEST) * whole @ text.T
        right = torch.arange(count, device=self.device)
        by_video = F.cross_entropy(logits[:count], right)
        loss = (by_video + F.cross_entropy(logits[:, :count].T, right)) / 2
        self.learner.step(loss + facts, index, warm_cosine(index, options.steps))
        hits = (logits[:count].argmax(1) == right).float().mean()
        return {"loss": loss.item(), "facts": facts.item(), "hits": hits.item()}

    def finished(self) -> SpriteVideoText:
        """Return the average model."""
        return self.learner.average.model

    @torch.no_grad()
    def show(self, folder: Path, index: int) -> dict[str, float]:
        """Score held-out clips; write the accuracies by attribute into the folder.

        `found` is the share whose caption ranks first among all, `right` the share that fits its
        caption better than one with a changed attribute.
        """
        model, options = self.finished(), self.options
        rng = np.random.default_rng(0)
        scenes = [sample_scene(seed, "test") for seed in range(options.shown)]
        frames, numbers = clips_of(scenes, [FRAMES.draw(rng, 81) for _ in scenes])
        video = model.embed_video(frames.to(self.device), numbers.to(self.device))
        text = model.embed_text([scene.caption.text for scene in scenes])
        ranked_first = (video @ text.T).argmax(1).cpu()
        retrieved = (ranked_first == torch.arange(len(scenes))).float().mean().item()
        fits, shares, lines = (video * text).sum(1), [], []
        for name in ATTRIBUTES:
            drawn = [draw_change(scene.caption, rng, frozenset({name})) for scene in scenes]
            picked = [(i, change) for i, change in enumerate(drawn) if change]
            if not picked:
                continue
            captions = [changed(scenes[i].caption, change, rng) for i, change in picked]
            false = model.embed_text([caption.text for caption in captions])
            rows = torch.tensor([i for i, _ in picked], device=self.device)
            shares.append((fits[rows] > (video[rows] * false).sum(1)).float().mean().item())
            lines.append(f"{name:<14}{100 * shares[-1]:6.2f}{len(picked):6d}")
        (folder / f"answers_{index:06d}.txt").write_text("\n".join(lines) + "\n")
        return {"found": retrieved, "right": float(np.mean(shares))}


def make_batch(options: RewardOptions, failures: Failures | None, index: int) -> Batch:
    """Draw a step's scenes and their twins, in turn; all clips have equally many frames.

    The last scenes are those of `failures`, if there are any.
    """
    rng = stream(options.seed, index, 0)
    scenes: list[Scene] = []
    known = len(failures.seeds) if failures else 0
    missed = min(known, round(options.failed * options.batch))
    chosen = rng.choice(known, missed, replace=False) if missed else []
    usual = rng.integers(1 << 40, size=options.batch - missed)
    for seed in (*usual, *(failures.seeds[number] for number in chosen)):
        scene = sample_scene(int(seed))
        change = draw_change(scene.caption, rng, VISIBLE)
        scenes += [scene, twin(scene, change, changed(scene.caption, change, rng), rng)]
    count = int(rng.choice((3, 5, FRAMES.count), p=(0.1, 0.1, 0.8)))
    drawn = []
    for scene in range(options.batch):  # a scene and its twin have the same frame numbers
        longest = options.longest if scene < len(usual) else failures.true.shape[1]
        interval = int(rng.choice((1, 2, FRAMES.interval, 4), p=(0.1, 0.1, 0.7, 0.1)))
        span = interval * (count - 1)
        first = 0 if rng.random() < FRAMES.opening else int(rng.integers(longest - span))
        drawn += 2 * [tuple(range(first, first + span + 1, interval))]
    frames, numbers = clips_of(scenes, drawn)
    captions = [scene.caption for scene in scenes]
    true = [_reworded(caption, rng) for caption in captions]
    false = [_false(caption, rng) for caption in captions]
    seen = _stacked([_facts_of_scene(scene) for scene in scenes])
    said = _stacked([facts_of(caption.objects, caption.ground) for caption in captions])
    failed = None
    if missed:
        places = range(2 * len(usual), len(frames), 2)
        pairs = [*zip(chosen, (list(drawn[place]) for place in places), strict=True)]
        frames[places.start :: 2] = to_unit([failures.true[n][at] for n, at in pairs])
        failed = to_unit([failures.failed[n][at] for n, at in pairs])
    return Batch(frames, numbers, true, false, seen, said, failed)


def to_unit(clips: Sequence[ndarray]) -> Tensor:
    """Return uint8 clips [F, H, W, 3] as frames [B, F, 3, H, W] in 0–1."""
    return torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 255


def _facts_of_scene(scene: Scene) -> tuple[Tensor, Tensor]:
    return facts_of([body.stated for body in scene.bodies], scene.ground.name)


def _stacked(facts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    holds, known = zip(*facts, strict=True)
    return torch.stack(holds), torch.stack(known)


def clips_of(scenes: list[Scene], drawn: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Render frames [B, F, 3, H, W] in 0–1 of scenes at these numbers; returns both."""
    clips = [
        render_at(scene, np.array(numbers) / FPS, SIZE)
        for scene, numbers in zip(scenes, drawn, strict=True)
    ]
    return to_unit(clips), torch.tensor(drawn)


def worn(frames_BFCHW: Tensor, options: RewardOptions, generator: torch.Generator) -> Tensor:
    """Blur frames and add noise, by random amounts per clip, like a VAE or a small model."""
    device = frames_BFCHW.device
    amount = torch.rand(2, len(frames_BFCHW), 1, 1, 1, 1, generator=generator, device=device)
    flat = F.pad(frames_BFCHW.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(flat, 3, stride=1).view_as(frames_BFCHW)
    noise = torch.randn(frames_BFCHW.shape, generator=generator, device=device)
    mixed = torch.lerp(frames_BFCHW, blurred, options.blur * amount[0])
    return (mixed + options.noise * amount[1] * noise).clamp(0, 1)


def _reworded(caption: Caption, rng: np.random.Generator) -> str:
    return write(caption.objects, caption.relation, caption.ground, rng).text


def _false(caption: Caption, rng: np.random.Generator) -> str:
    return changed(caption, draw_change(caption, rng), rng).text
