"""A row of the results tables: its training, its sampling, and its clips' measurements.

Factors and measurements stay in the run's folder, so an interrupted command resumes with the next
row.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy import ndarray
from safetensors import safe_open
from torch import Tensor, nn

from ..noise.file import load_refiner
from ..noise.refiner import Refiner, merged
from ..noise.source import VERSION as NOISE_VERSION
from ..samplers import SAMPLERS, SEARCHES, Method
from ..samplers.search import Judge, Verifier
from ..schedule import Chunk, Preset, plan_chunks
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

JUDGES = {"dmd": ("teacher",), "reward": ("vae", "reward")}  # models of each objective
TIMED = 3  # rounds of time_again
Search = Literal["", "best-of-n", "search-over-path"]
Sampler = Literal["self-forcing", "self-refine"]
Train = Callable[[RefineOptions, Path, Path, torch.device], Path]  # to a file; state in a folder


@dataclass(frozen=True, slots=True)
class Row:
    """A name and the differences from the base: training, sampling, control."""

    name: str
    training: RefineOptions | None = None
    levels: tuple[int, ...] | None = None  # refined when sampling; None: as in training
    search: Search = ""
    candidates: int = 5  # of a search
    sampler: Sampler = "self-forcing"  # without a search
    sampler_levels: tuple[int, ...] = PRESET.levels  # nominal, of the sampler
    control: Control | None = None  # an untrained residual

    @property
    def preset(self) -> Preset:
        """The sampling preset."""
        return PRESET.changed(levels=self.sampler_levels)

    @property
    def refined(self) -> tuple[int, ...] | None:
        """The levels refined when sampling; None if the method leaves no choice."""
        if self.training is None or self.training.method != "autorefiner":
            return None
        return tuple(sorted(self.levels or self.training.levels, reverse=True))

    def file(self) -> str:
        """Name the factors' file by a hash of the training and its models.

        Equal trainings share a file, compiled or not, whatever their sample sheets show.
        """
        training = replace(self.training, compiled=False, shown=1)
        digest = hashlib.sha256(repr(training).encode())
        for name in ("student", "text", *JUDGES[self.training.objective]):
            digest.update(weights_of(WEIGHTS / FILES[name]))
        return f"{digest.hexdigest()[:16]}.safetensors"


def weights_of(path: Path) -> bytes:
    """Hash a model file's tensors, in the order of their names, without the metadata."""
    digest = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.digest()


@dataclass(slots=True)
class Cost:
    """The cost of sampling."""

    passes: int = 0  # of the network
    verifications: int = 0  # scored candidates, each of which is decoded
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The measurements of one row."""

    scores: list[ClipScores]  # of each clip, seed by seed
    spreads: ndarray  # of each caption, [captions, 2]
    cost: Cost  # of all clips
    frames: int  # of all clips
    chunks: int
    trained_on: str = ""  # a machine; "" where nothing was trained
    measured_on: str = ""
    timed_on: str = ""  # where it was timed again

    def write(self, path: Path, key: str) -> None:
        """Write it as the measurement of `key`."""
        document = {
            "key": key,
            "scores": [asdict(scores) for scores in self.scores],
            "spreads": self.spreads.tolist(),
            "cost": asdict(self.cost),
            "frames": self.frames,
            "chunks": self.chunks,
            "trained_on": self.trained_on,
            "measured_on": self.measured_on,
            "timed_on": self.timed_on,
        }
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(document))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path, key: str) -> "Outcome | None":
        """Read the measurement of `key`; None if the file has none."""
        if not path.exists():
            return None
        document = json.loads(path.read_text())
        if document["key"] != key:
            return None
        return cls(
            scores=[ClipScores(**scores) for scores in document["scores"]],
            spreads=np.array(document["spreads"]),
            cost=Cost(**document["cost"]),
            frames=document["frames"],
            chunks=document["chunks"],
            trained_on=document.get("trained_on", ""),
            measured_on=document.get("measured_on", ""),
            timed_on=document.get("timed_on", ""),
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """The models, captions and seeds, and so the noise, that all rows share."""

    demo: Demo
    captions: Sequence[Caption]
    seeds: int
    frames: int  # latent
    run: Path
    rewards: Mixture | None = None  # for searches
    train: Train | None = None  # None: only rows that are trained already

    def outcome(self, row: Row, device: torch.device) -> Outcome:
        """Train the row, sample and score its clips, skipping what is already done.

        Rows that differ only in their names share training and measurement.
        """
        factors = self._factors(row, device)
        key = self._key(row, factors)
        if outcome := Outcome.read(self._path(key), key):
            return outcome
        outcome = self._measure(row, *self._models(row, factors), helpers(device))
        trained_on = ""
        if factors and _machine_file(factors).exists():
            trained_on = _machine_file(factors).read_text()
        outcome = replace(outcome, trained_on=trained_on, measured_on=machine(device))
        outcome.write(self._path(key), key)
        return outcome

    def trained(self, row: Row) -> bool:
        """Return whether the row needs no training, or has it already."""
        return row.training is None or (self.run / row.file()).exists()

    def time_again(self, rows: Sequence[Row], device: torch.device) -> None:
        """Time the rows' clips again: the median of TIMED rounds.

        A round is a batch of each row, so that a machine's slow minutes affect all rows. Searches
        have separate rounds, as their batches take minutes and would slow down the next row.
        """
        seconds: dict[str, list[float]] = {row.name: [] for row in rows}
        direct = [row for row in rows if not row.search]
        searching = [row for row in rows if row.search]
        for row in TIMED * direct + TIMED * searching:
            cost, models = Cost(), self._models(row, self._factors(row, device))
            clips = self._clips(row, *models, self.captions[:BATCH], 0, Cost())
            frames = sum(map(len, timed(clips, cost)))
            seconds[row.name].append(cost.seconds / frames)
        for row in rows:
            outcome = self.outcome(row, device)
            total = float(np.median(seconds[row.name])) * outcome.frames
            key = self._key(row, self._factors(row, device))
            cost = replace(outcome.cost, seconds=total)
            timed_outcome = replace(outcome, cost=cost, timed_on=machine(device))
            timed_outcome.write(self._path(key), key)

    def _path(self, key: str) -> Path:
        return self.run / f"{key[:16]}.json"

    def _factors(self, row: Row, device: torch.device) -> Path | None:
        """Train the row if needed; returns its factors' file, None for an untrained row."""
        if row.training is None:
            return None
        out = self.run / row.file()
        if not out.exists():
            if self.train is None:
                raise ValueError(f"{row.name} needs training, and this bench was given none")
            _machine_file(out).write_text(machine(device))
            self.train(row.training, out, self.run / out.stem, device)
        return out

    def _key(self, row: Row, factors: Path | None) -> str:
        """Hash everything that the measurement depends on."""
        digest = hashlib.sha256()
        names = ("student", "vae", "text", "reward") if row.search else ("student", "vae", "text")
        for path in (*(WEIGHTS / FILES[name] for name in names), factors):
            digest.update(weights_of(path) if path else b"")
        method = row.sampler, row.search, row.candidates, row.sampler_levels
        texts = [caption.text for caption in self.captions]
        clips = texts, self.seeds, self.frames
        digest.update(repr((NOISE_VERSION, method, row.refined, row.control, clips)).encode())
        return digest.hexdigest()

    def _models(self, row: Row, factors: Path | None) -> tuple[CausalWan, Refiner | None]:
        """Return the denoising network and the row's refiner."""
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

    def _measure(
        self, row: Row, network: CausalWan, refiner: Refiner | None, workers: int
    ) -> Outcome:
        cost = Cost()
        network = counted(network, cost)
        if isinstance(refiner, Refiner):
            refiner = replace(refiner, network=counted(refiner.network, cost))
        captions, clips = [*self.captions] * self.seeds, []

        def sample_all() -> Iterator[ndarray]:
            for seed in range(self.seeds):
                sampled = self._clips(row, network, refiner, self.captions, seed, cost)
                for clip in timed(sampled, cost):
                    clips.append(clip)
                    yield clip

        scores = score(sample_all(), captions, row.name, workers)
        frames = sum(map(len, clips))
        chunks = len(clips) * len(plan_chunks(row.preset, self.frames)[1])
        return Outcome(scores, spreads(clips, captions), cost, frames, chunks)

    def _clips(
        self, row: Row, network: CausalWan, refiner: Refiner | None, captions: Sequence[Caption],
        seed: int, cost: Cost,
    ) -> Iterator[ndarray]:  # fmt: skip
        return student_clips(
            network, self.demo.text, self.demo.vae, captions, seed=seed, preset=row.preset,
            frames=self.frames, refiner=refiner,
            method_of=lambda texts: self._method(row, texts, cost),
        )  # fmt: skip

    def _method(self, row: Row, texts: list[str], cost: Cost) -> Method:
        if not row.search:
            return SAMPLERS[row.sampler]()
        if self.rewards is None:
            raise ValueError(f"{row.name} needs a reward model to choose by")
        verifier = CountedVerifier(RewardVerifier(self.rewards, self.demo.vae, texts), cost)
        return SEARCHES[row.search](verifier, row.candidates)


@dataclass(frozen=True, slots=True)
class CountedVerifier:
    """A verifier that counts its scores, one per sample of the batch."""

    verifier: Verifier
    cost: Cost

    def begin(self) -> "CountedJudge":
        return CountedJudge(self.verifier.begin(), self.cost)


@dataclass(frozen=True, slots=True)
class CountedJudge:
    """The judge of a CountedVerifier."""

    judge: Judge
    cost: Cost

    def score(self, x0: Tensor, chunk: Chunk) -> Tensor:
        self.cost.verifications += len(x0)
        return self.judge.score(x0, chunk)

    def keep(self, x0: Tensor, chunk: Chunk) -> None:
        self.judge.keep(x0, chunk)


def counted(network: CausalWan, cost: Cost) -> CausalWan:
    """Count the passes of a network, one per sample of the batch."""

    def embed_and_count(patch_embedding: nn.Module, x: Tensor) -> Tensor:
        cost.passes += len(x)
        return embed(patch_embedding, x)

    return replace(network, kernels=replace(network.kernels, embed=embed_and_count))


def timed(clips: Iterable[ndarray], cost: Cost) -> Iterator[ndarray]:
    """Yield the clips and count the seconds of producing them, without the consumer's."""
    rest = iter(clips)
    while True:
        began = time.perf_counter()
        clip = next(rest, None)
        cost.seconds += time.perf_counter() - began
        if clip is None:
            return
        yield clip


def machine(device: torch.device) -> str:
    """Return a device's name for the tables."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def _machine_file(factors: Path) -> Path:
    """Return the path of the note that names the factors' training machine."""
    return factors.with_suffix(".machine.txt")
