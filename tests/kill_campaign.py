"""Kill runs at random moments and check that nothing finished is lost.

Usage: python tests/kill_campaign.py --help. Every run is a fork of this process after its imports,
so a kill hits the run and not the loading of libraries. A run reports finished work through a pipe;
after the kill every file is read back, and the run is resumed until it ends, when its output must
equal that of a run never killed. At 832x480 stand-ins replace the networks (saved latents, enlarged
to pixels), as the real ones take minutes a chunk on a CPU; writing, reading and resuming are real.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork after OpenMP has started threads would wait for them

import av
import numpy as np
import torch
from safetensors.torch import load_file

from autorefiner.refiner import generate as generating
from autorefiner.refiner.cli import main
from autorefiner.refiner.generate import generate
from autorefiner.refiner.job import prepare
from autorefiner.refiner.latents import count_latents, read_latents
from autorefiner.refiner.sample import RunPlan
from autorefiner.refiner.training import loop

from tiny_bundle import use_bundle, write_tiny_bundle
from tiny_command import command, parse, write_files

Report = Callable[[int], None]  # reports the work finished so far
Run = Callable[[Path, Report], None]
KINDS = ("stream", "large", "train")


@dataclass(slots=True)
class Tally:
    """Counts of a campaign; the last three must stay 0."""

    kills: Counter = field(default_factory=Counter)
    finished: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return self.lost + self.unreadable + self.different


def frames_of(path: Path) -> np.ndarray:
    """Return every decoded frame of a video; none if the file is missing."""
    if not path.exists():
        return np.zeros((0, 1, 1, 3), np.uint8)
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def running(child: int) -> bool:
    """Return whether a child is still running, without waiting for it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def log_of(folder: Path) -> Path:
    """Return what the last run in a folder printed."""
    return folder.with_name(f"{folder.name}.log")


def forked(run: Run, folder: Path, delay: float | None) -> tuple[int, int, float]:
    """Run in a child and kill it after `delay`; return (exit status, last report, seconds)."""
    reading, writing = os.pipe()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        os.close(reading)
        said = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = 1
        try:
            run(folder, lambda done: os.write(writing, done.to_bytes(4, "big")) and None)
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(writing)
    if delay is not None:
        deadline = began + delay
        while time.perf_counter() < deadline and running(child):
            time.sleep(min(0.002, max(0.0, deadline - time.perf_counter())))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - began
    reports = b""
    while piece := os.read(reading, 1 << 16):
        reports += piece
    os.close(reading)
    done = int.from_bytes(reports[-4:], "big") if reports else 0
    return os.waitstatus_to_exitcode(status), done, seconds


def stream(arguments: list[str], report: Report) -> None:
    """Run `generate`, reporting every chunk that reached the file."""
    for frames in generate(prepare(parse(arguments))):
        report(frames)


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip that is sampled, killed and extended until it is finished."""

    files: Path
    size: tuple[int, int]
    frames: int

    def arguments(self, folder: Path) -> list[str]:
        """Return the command; it extends what a kill left, if there is anything."""
        out, sides = folder / "fox.mp4", "x".join(map(str, self.size))
        run = command(
            self.files, out, "--save-latents", "--frames", str(self.frames), "--size", sides
        )
        left = (folder / "fox.latents.safetensors", folder / "fox.latents.partial.safetensors")
        found = next((path for path in left if path.exists()), None)
        return [*run, "--extend", str(found)] if found else run

    def run(self, folder: Path, report: Report) -> None:
        stream(self.arguments(folder), report)

    def state(self, folder: Path) -> tuple[np.ndarray, torch.Tensor | None]:
        """Return the decoded frames of the video, finished or not, and the latents."""
        videos = (folder / "fox.mp4", folder / "fox.partial.mp4")
        latents = (folder / "fox.latents.safetensors", folder / "fox.latents.partial.safetensors")
        video = next((path for path in videos if path.exists()), videos[0])
        path = next((path for path in latents if path.exists() and count_latents(path)), None)
        return frames_of(video), read_latents(path)[0] if path else None

    def finished(self, folder: Path) -> bool:
        return (folder / "fox.mp4").exists() and (folder / "fox.latents.safetensors").exists()

    def check(self, folder: Path, done: int, before: int, reference: Path, tally: Tally) -> int:
        """Compare the files with the reference; return the number of frames that are safe."""
        frames, latents = self.state(folder)
        whole, expected = self.state(reference)
        held = 0 if latents is None else 4 * latents.shape[2] - 3
        safe = max(done, before)
        if len(frames) < safe or held < safe:
            tally.lost.append(
                f"{folder}: {safe} frames were safe, now {len(frames)} shown, {held} in latents"
            )
        if len(frames) and not np.array_equal(frames, whole[: len(frames)]):
            tally.different.append(f"{folder}: pixels")
        if latents is not None and not torch.equal(latents, expected[:, :, : latents.shape[2]]):
            tally.different.append(f"{folder}: latents")
        return safe

    def leftovers(self, folder: Path) -> list[str]:
        return sorted(
            {path.name for path in folder.iterdir()} - {"fox.mp4", "fox.latents.safetensors"}
        )


@dataclass(frozen=True, slots=True)
class Training:
    """A training that is killed and restarted until it ends; every step is saved."""

    steps: int

    def run(self, folder: Path, report: Report) -> None:
        save = loop.save

        def reported(stage: loop.Stage, run: Path, done: int) -> None:
            save(stage, run, done)
            report(done)

        loop.save = reported
        config = folder / "small.toml"
        config.write_text(
            'out = "small.safetensors"\nrun = "run"\nsave_every = 1\nshow_every = 3\n'
            f"[refiner]\nsteps = {self.steps}\nbatch = 2\nrank = 2\nframes = 6\nratio = 2\n"
            "shown = 1\n"
        )
        if main(["train", str(config), "--device", "cpu"]):
            raise SystemExit("the training failed")

    def saved(self, folder: Path) -> int:
        state = folder / "run" / "state.pt"
        return torch.load(state, weights_only=True)["done"] if state.exists() else 0

    def finished(self, folder: Path) -> bool:
        return (folder / "small.safetensors").exists()

    def check(self, folder: Path, done: int, before: int, reference: Path, tally: Tally) -> int:
        """Compare the saved step with the last report, a finished refiner with the reference."""
        saved = self.saved(folder)
        if saved < max(done, before):
            tally.lost.append(f"{folder}: {done} steps reported, {before} before, {saved} saved")
        if self.finished(folder):
            ours, theirs = (load_file(path / "small.safetensors") for path in (folder, reference))
            same = ours.keys() == theirs.keys() and all(
                torch.equal(ours[name], theirs[name]) for name in ours
            )
            logged = [path / "run" / "log.jsonl" for path in (folder, reference)]
            lengths = [len(path.read_text().splitlines()) for path in logged]
            if not same or lengths != [self.steps] * 2:
                tally.different.append(f"{folder}: refiner or log, {lengths} lines")
        return saved

    def leftovers(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.rglob(".*"))


def large_networks() -> None:
    """Replace the networks in this process by saved latents, enlarged to pixels."""

    def sample(
        network: object,
        context: object,
        plan: RunPlan,
        initial: torch.Tensor | None = None,
        **_: object,
    ):
        for chunk in plan.chunks:
            generator = torch.Generator().manual_seed(chunk.start)
            yield torch.randn(1, 16, chunk.length, plan.height, plan.width, generator=generator)

    class Enlarged:
        def decode(self, x0: torch.Tensor, state: list[int]) -> torch.Tensor:
            frames = x0.repeat_interleave(4, dim=2)[:, :3, 0 if state else 3 :]
            state.append(1)
            return (frames / 4).repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)

    generating.sample = sample
    generating.make_context = generating.load_network = lambda job: None
    generating.load_vae = lambda job: Enlarged()
    generating.DecoderState = list


def campaign(kind: str, kills: int, seed: int, seconds: float, folder: Path, tally: Tally) -> None:
    """Kill one kind of run until there are enough kills or time is up."""
    rng, deadline = random.Random(f"{seed} {kind}"), time.monotonic() + seconds
    if kind == "train":
        write_tiny_bundle(folder / "models")
        use_bundle(folder / "models")
        subject: Clip | Training = Training(steps=6)
    else:
        files = folder / "files"
        files.mkdir()
        subject = Clip(
            write_files(files),
            (832, 480) if kind == "large" else (48, 32),
            61 if kind == "large" else 81,
        )
        if kind == "large":
            large_networks()
    reference = folder / "reference"
    reference.mkdir()
    status, _, span = forked(subject.run, reference, None)
    if status or not subject.finished(reference):
        raise SystemExit(f"{kind}: the run that is not killed failed")
    number = 0
    while tally.kills[kind] < kills and time.monotonic() < deadline:
        number += 1
        span = min(
            span, one_run(subject, kind, folder / f"run_{number:03d}", reference, rng, span, tally)
        )


def one_run(
    subject: Clip | Training,
    kind: str,
    folder: Path,
    reference: Path,
    rng: random.Random,
    span: float,
    tally: Tally,
) -> float:
    """Kill a run up to four times, then let it end; return the longest seconds of one part."""
    folder.mkdir()
    safe, longest = 0, 0.0
    for attempt in range(5):
        delay = rng.uniform(0, span) if attempt < 4 else None
        status, done, seconds = forked(subject.run, folder, delay)
        longest = max(longest, seconds)
        killed = status == -signal.SIGKILL
        tally.kills[kind] += killed
        if not killed and status:
            said = log_of(folder).read_text(errors="replace").splitlines()[-1:]
            tally.unreadable.append(f"{folder}: a run ended with status {status}: {said}")
            return longest
        try:
            safe = subject.check(folder, done, safe, reference, tally)
        except (ValueError, OSError, RuntimeError, EOFError) as error:
            tally.unreadable.append(f"{folder}: {type(error).__name__}: {error}")
        if subject.finished(folder):
            break
    if not subject.finished(folder):
        tally.lost.append(f"{folder}: not finished")
    elif left := subject.leftovers(folder):
        tally.different.append(f"{folder}: {', '.join(left)} left")
    tally.finished[kind] += 1
    return longest


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--kills", type=int, default=40, help="of each kind of run (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--minutes", type=float, default=18, help="for all kinds (default %(default)s)"
    )
    return parser.parse_args()


def report(tally: Tally, kinds: list[str]) -> None:
    for kind in kinds:
        print(f"{kind}: {tally.kills[kind]} kills, {tally.finished[kind]} runs finished")
    print(
        f"lost {len(tally.lost)}, unreadable {len(tally.unreadable)}, "
        f"different {len(tally.different)}"
    )
    for fault in tally.faults:
        print(f"  {fault}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    options, counted = parsed(), Tally()
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.kinds:
            place = Path(scratch) / name
            place.mkdir()
            campaign(
                name,
                options.kills,
                options.seed,
                60 * options.minutes / len(options.kinds),
                place,
                counted,
            )
    report(counted, options.kinds)
    sys.exit(
        bool(counted.faults) or any(counted.kills[name] < options.kills for name in options.kinds)
    )
