"""One row of the results tables: what is trained for it, how it is sampled, and what was measured of its clips.

Factors and measurements stay in the run's folder, so a command that was stopped goes on with the next row.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy import ndarray
from safetensors import safe_open
from torch import Tensor, nn

from ..generate import SPRITES
from ..noise.file import load_refiner
from ..noise.refiner import Refiner, merged
from ..noise.source import VERSION as NOISE_VERSION
from ..samplers import SEARCHES, Method, self_forcing
from ..samplers.search import Judge, Verifier
from ..schedule import Chunk, Preset, plan_chunks
from ..train import train_refiner
from ..train_config import RewardConfig, TrainConfig
from ..training.ahead import helpers
from ..training.options import RefineOptions
from ..training.rewards.reward import Mixture
from ..training.rewards.verifier import RewardVerifier
from ..wan.causal import CausalWan, embed
from ..wan.lora import read_lora
from .bundle import FILES, WEIGHTS
from .captions import Caption
from .clips import BATCH, PRESET, score, student_clips
from .controls import Control
from .evaluation import Demo
from .metrics.diversity import spreads
from .metrics.evaluate import ClipScores

AIMED_BY = {"dmd": ("teacher",), "reward": ("vae", "reward")}  # what an objective looks at the student's clips with
TIMED = 3  # rounds
Search = Literal["", "best-of-n", "search-over-path"]


@dataclass(frozen=True, slots=True)
class Row:
    """A name, and what differs from the base: a training, the levels refined when sampling, a search, another sampler,
    or a residual that nothing was trained for."""

    name: str
    training: RefineOptions | None = None
    levels: tuple[int, ...] | None = None  # those it was trained with unless told
    search: Search = ""
    sampler_levels: tuple[int, ...] = PRESET.steps  # nominal, of the sampler
    control: Control | None = None

    @property
    def preset(self) -> Preset:
        """The sampling preset."""
        return PRESET.changed(steps=self.sampler_levels)

    @property
    def refined(self) -> tuple[int, ...] | None:
        """The levels refined when sampling; None where the method leaves no choice."""
        if self.training is None or self.training.method != "autorefiner":
            return None
        return tuple(sorted(self.levels or self.training.levels, reverse=True))

    def file(self) -> str:
        """Of its factors; rows that train the same with the same models share them, compiled or not, whatever is shown
        meanwhile."""
        digest = hashlib.sha256(repr(replace(self.training, compiled=False, shown=1)).encode())
        for name in ("student", "text", *AIMED_BY[self.training.objective]):
            digest.update(weights_of(WEIGHTS / FILES[name]))
        return f"{digest.hexdigest()[:16]}.safetensors"


def weights_of(path: Path) -> bytes:
    """A digest of a model file's tensors, whatever else its header says, and in whatever order."""
    digest = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.digest()


@dataclass(slots=True)
class Cost:
    """What sampling took: passes of the network; scores asked for, each of which decodes; seconds."""

    passes: int = 0
    verifications: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one row: scores of each clip, seed by seed; spreads of each caption [captions, 2]; cost of all clips."""

    scores: list[ClipScores]
    spreads: ndarray
    cost: Cost
    frames: int  # of all clips together
    chunks: int
    trained_on: str = ""  # a machine; nothing where nothing was trained
    measured_on: str = ""

    def write(self, path: Path, key: str) -> None:
        """Keep it as the measurement of `key`."""
        told = {
            "key": key, "scores": [asdict(one) for one in self.scores], "spreads": self.spreads.tolist(),
            "cost": asdict(self.cost), "frames": self.frames, "chunks": self.chunks,
            "trained_on": self.trained_on, "measured_on": self.measured_on,
        }  # fmt: skip
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(told))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path, key: str) -> "Outcome | None":
        """What was measured, if it was of this."""
        if not path.exists() or (told := json.loads(path.read_text()))["key"] != key:
            return None
        scores = [ClipScores(**one) for one in told["scores"]]
        machines = told.get("trained_on", ""), told.get("measured_on", "")
        return cls(scores, np.array(told["spreads"]), Cost(**told["cost"]), told["frames"], told["chunks"], *machines)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row is measured with: the same models, captions, seeds and so the same noise."""

    demo: Demo
    captions: Sequence[Caption]
    seeds: int
    frames: int  # latent
    run: Path
    rewards: Mixture | None = None  # what the searches choose by
    candidates: int = 5

    def outcome(self, row: Row, device: torch.device) -> Outcome:
        """Train what the row needs, unless that was done; sample and score its clips, unless that was done, be it for
        another row that is the same but for its name."""
        factors = self._factors(row, device)
        key = self._key(row, factors)
        if found := Outcome.read(self._path(key), key):
            return found
        found = self._measure(row, *self._models(row, factors), helpers(device))
        trained_on = _machine_file(factors).read_text() if factors and _machine_file(factors).exists() else ""
        found = replace(found, trained_on=trained_on, measured_on=machine(device))
        found.write(self._path(key), key)
        return found

    def time_again(self, rows: Sequence[Row], device: torch.device) -> None:
        """Put the seconds of the rows' clips in the place of those they were measured with: as a batch takes now, the
        median of TIMED rounds in which each row makes one, so that a machine's slow minutes are everyone's. Searches
        have rounds of their own: a batch takes them minutes, and whoever came next would be slow."""
        seconds: dict[str, list[float]] = {row.name: [] for row in rows}
        direct = [row for row in rows if not row.search]
        searching = [row for row in rows if row.search]
        for row in TIMED * direct + TIMED * searching:
            cost, models = Cost(), self._models(row, self._factors(row, device))
            frames = sum(map(len, timed(self._clips(row, *models, self.captions[:BATCH], 0, Cost()), cost)))
            seconds[row.name].append(cost.seconds / frames)
        for row in rows:
            found = self.outcome(row, device)
            cost = replace(found.cost, seconds=float(np.median(seconds[row.name])) * found.frames)
            key = self._key(row, self._factors(row, device))
            replace(found, cost=cost).write(self._path(key), key)

    def _path(self, key: str) -> Path:
        return self.run / f"{key[:16]}.json"

    def _factors(self, row: Row, device: torch.device) -> Path | None:
        if row.training is None:
            return None
        out = self.run / row.file()
        if not out.exists():
            rewards = (RewardConfig(SPRITES),) if row.training.objective == "reward" else ()
            train_refiner(TrainConfig(out, self.run / out.stem, refiner=row.training, rewards=rewards), device)
            _machine_file(out).write_text(machine(device))
        return out

    def _key(self, row: Row, factors: Path | None) -> str:
        """Says all that the measurement depends on."""
        digest = hashlib.sha256()
        names = ("student", "vae", "text", "reward") if row.search else ("student", "vae", "text")
        for path in (*(WEIGHTS / FILES[name] for name in names), factors):
            digest.update(weights_of(path) if path else b"")
        sampled = (row.refined, row.search, len(self.captions), self.seeds, self.frames, self.candidates)
        if row.control or row.preset != PRESET:  # so that other rows keep the names they had
            sampled += (row.sampler_levels, row.control)
        digest.update(repr((NOISE_VERSION, *sampled)).encode())
        return digest.hexdigest()

    def _models(self, row: Row, factors: Path | None) -> tuple[CausalWan, Refiner | None]:
        """The network that denoises, and the refiner."""
        student = self.demo.student
        if row.control is not None:
            return student, row.control.refiner(student, row.levels or row.sampler_levels[1:])
        if factors is None:
            return student, None
        if row.training.method == "lora":
            return merged(student, read_lora(factors), silent_head=False), None
        pairs, card = load_refiner(factors)
        levels = card.levels if row.levels is None else row.levels
        return student, Refiner(merged(student, pairs), card.cache, frozenset(levels))

    def _measure(self, row: Row, network: CausalWan, refiner: Refiner | None, workers: int) -> Outcome:
        cost = Cost()
        network = counted(network, cost)
        if isinstance(refiner, Refiner):
            refiner = replace(refiner, network=counted(refiner.network, cost))
        captions, clips = [*self.captions] * self.seeds, []

        def made() -> Iterator[ndarray]:
            for seed in range(self.seeds):
                for clip in timed(self._clips(row, network, refiner, self.captions, seed, cost), cost):
                    clips.append(clip)
                    yield clip

        scores = score(made(), captions, row.name, workers)
        frames = sum(map(len, clips))
        chunks = len(clips) * len(plan_chunks(row.preset, self.frames)[1])
        return Outcome(scores, spreads(clips, captions), cost, frames, chunks)

    def _clips(
        self, row: Row, network: CausalWan, refiner: Refiner | None, captions: Sequence[Caption], seed: int, cost: Cost
    ) -> Iterator[ndarray]:
        return student_clips(
            network, self.demo.text, self.demo.vae, captions, seed=seed, preset=row.preset, frames=self.frames,
            refiner=refiner, method_of=lambda texts: self._method(row, texts, cost),
        )  # fmt: skip

    def _method(self, row: Row, texts: list[str], cost: Cost) -> Method:
        if not row.search:
            return self_forcing()
        if self.rewards is None:
            raise ValueError(f"{row.name} needs a reward model to choose by")
        verifier = CountedVerifier(RewardVerifier(self.rewards, self.demo.vae, texts), cost)
        return SEARCHES[row.search](verifier, self.candidates)


@dataclass(frozen=True, slots=True)
class CountedVerifier:
    """A verifier whose scores are counted, one a sample of the batch."""

    verifier: Verifier
    cost: Cost

    def begin(self) -> "CountedJudge":
        return CountedJudge(self.verifier.begin(), self.cost)


@dataclass(frozen=True, slots=True)
class CountedJudge:
    """Its judge."""

    judge: Judge
    cost: Cost

    def score(self, x0: Tensor, chunk: Chunk) -> Tensor:
        self.cost.verifications += len(x0)
        return self.judge.score(x0, chunk)

    def keep(self, x0: Tensor, chunk: Chunk) -> None:
        self.judge.keep(x0, chunk)


def counted(network: CausalWan, cost: Cost) -> CausalWan:
    """The same network, whose passes are counted, one a sample of the batch."""

    def embed_and_count(patch_embedding: nn.Module, x: Tensor) -> Tensor:
        cost.passes += len(x)
        return embed(patch_embedding, x)

    return replace(network, kernels=replace(network.kernels, embed=embed_and_count))


def timed(clips: Iterable[ndarray], cost: Cost) -> Iterator[ndarray]:
    """The same clips; the seconds that making them takes are counted, those of whoever takes them are not."""
    rest = iter(clips)
    while True:
        began = time.perf_counter()
        clip = next(rest, None)
        cost.seconds += time.perf_counter() - began
        if clip is None:
            return
        yield clip


def machine(device: torch.device) -> str:
    """What a device is called in a table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def _machine_file(factors: Path) -> Path:
    """Beside factors: the machine that they were trained on."""
    return factors.with_suffix(".machine.txt")
