"""Runs without an end: the chunks of a finite run, and nothing that grows but the files."""

import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from autorefiner.refiner import sample as sampling
from autorefiner.refiner.choices import choose
from autorefiner.refiner.commands.generate import Stream
from autorefiner.refiner.fragments import boxes
from autorefiner.refiner.job import prepare
from autorefiner.refiner.latents import (
    HEADER,
    first_lengths,
    format_lengths,
    inspect_latents,
    whole_frames,
)
from autorefiner.refiner.memory.policies import POLICIES
from autorefiner.refiner.rollout import Progress, Rollout
from autorefiner.refiner.run_plan import RunPlan, suggested
from autorefiner.refiner.sample import sample
from autorefiner.refiner.schedule import PRESETS, plan_chunks
from autorefiner.refiner.timeline import Recache, Scene, Timeline
from autorefiner.refiner.video import VideoWriter

from tiny_command import command, parse

PRESET = PRESETS["self-forcing"].changed(window=9, sink=3)
ENDLESS = ("--frames", "endless", "--window", "9", "--sink", "3")


@pytest.mark.parametrize("changes", [{}, {"first_alone": True}, {"first_levels": (1000, 250)}])
@pytest.mark.parametrize("given", [0, 1, 4, 6])
def test_chunks_are_those_of_a_finite_run(changes: dict, given: int) -> None:
    preset = replace(PRESET, **changes)
    finite = RunPlan(preset, 31 if given else 25, 4, 4, given=given)
    endless = RunPlan(preset, None, 4, 4, given=given)
    count = len(finite.chunks) - 1  # the last one may be shorter
    assert tuple(islice(endless.chunks, count)) == finite.chunks[:count]
    assert tuple(islice(endless.chunks, count)) == finite.chunks[:count]  # and again
    assert endless.given_chunks == finite.given_chunks
    assert endless.levels == finite.levels


def test_an_endless_run_makes_the_latents_of_a_finite_one(network, context) -> None:
    finite = sample(network, context, RunPlan(PRESET, 18, 4, 4), seed=3)
    endless = sample(network, context, RunPlan(PRESET, None, 4, 4), seed=3)
    for x0 in finite:
        assert torch.equal(x0, next(endless))
    endless.close()


def test_chunk_lengths_of_an_endless_run_are_short_and_read_as_any() -> None:
    preset = replace(PRESET, first_alone=True)
    text = format_lengths(RunPlan(preset, None, 4, 4).lengths, endless=True)
    assert first_lengths(text, 9) == [1, 3, 3]
    assert whole_frames({"chunk_lengths": text}, 9, 0) == 7
    text = format_lengths(RunPlan(PRESET, None, 4, 4, given=6).lengths, endless=True)
    assert first_lengths(text, 12) == [3] * 4


@pytest.mark.parametrize(
    ("extra", "keyword"),
    [
        (("--frames", "endless", "--preset", "causvid"), "--window"),
        ((*ENDLESS, "--sheet", "a.png"), "--sheet"),
    ],
)
def test_what_needs_an_end_is_refused_before_loading(files, tmp_path, extra, keyword) -> None:
    with pytest.raises(ValueError, match=keyword) as error:
        prepare(parse(command(files, tmp_path / "fox.mp4", *extra)))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_an_endless_run_with_whole_files(files, tmp_path) -> None:
    out, latents = tmp_path / "fox.mp4", tmp_path / "fox.latents.safetensors"
    partial = tmp_path / "fox.latents.partial.safetensors"
    args = command(files, out, "--save-latents", *ENDLESS)
    run = subprocess.Popen(
        [sys.executable, "-m", "autorefiner.refiner.cli", *args],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    three_chunks = HEADER + 9 * 16 * 4 * 6 * 4
    while not (partial.exists() and partial.stat().st_size > three_chunks) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate()
    assert run.returncode == 0, errors.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == [latents.name, out.name]
    info = inspect_latents(latents)
    assert info.frames >= 9
    assert info.frames % 3 == 0
    with av.open(str(out)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 4 * info.frames - 3
        assert video.metadata["frames"] == "endless"
    total = str(4 * (info.frames + 3) - 3)
    again = (*ENDLESS[2:], "--frames", total, "--extend", str(latents))
    job = prepare(parse(command(files, tmp_path / "more.mp4", *again)))
    assert (job.plan.given, job.plan.frames) == (info.frames, 3)


class Bar:
    """Stands in for a tqdm bar."""

    text = ""

    def set_postfix_str(self, text: str) -> None:
        self.text = text


def test_the_first_ctrl_c_finishes_the_chunk_in_progress(files, tmp_path) -> None:
    job = prepare(parse(command(files, tmp_path / "fox.mp4", *ENDLESS)))
    chunk = next(iter(job.plan.chunks))
    view = Stream(job, Bar())
    with pytest.raises(KeyboardInterrupt):
        view.stop()  # nothing is in progress
    view.show(Progress(chunk, None, 1, torch.zeros(1)))
    assert "None" not in view.bar.text
    view.stop()
    assert view.stopping
    with pytest.raises(KeyboardInterrupt):
        view.stop()
    signal.setitimer(signal.ITIMER_REAL, 0)


def held(root: object) -> int:
    """Count what an object holds: items of containers, bytes of tensors and strings."""
    total, seen, stack = 0, set(), [root]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            total += item.untyped_storage().nbytes()
        elif isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, dict):
            total += len(item)
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            total += len(item)
            stack += item
        elif type(item).__module__.startswith("autorefiner") and not isinstance(item, type):
            slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
            stack += [getattr(item, name) for name in slots if hasattr(item, name)]
            stack += list(getattr(item, "__dict__", {}).values())
    return total


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_that_a_rollout_holds_grows(network, context, monkeypatch, name) -> None:
    rollouts, make = [], Rollout.of

    def of(*args, **options) -> Rollout:
        rollouts.append(make(*args, **options))
        return rollouts[-1]

    monkeypatch.setattr(sampling.Rollout, "of", of)
    policy = choose(name, POLICIES, "memory")
    preset = suggested(PRESET.changed(levels=(1000,)), policy)
    plan = RunPlan(preset, None, 4, 4, policy=policy)
    timeline = Timeline((Scene(0, context), Scene(6, -context, Recache(6))))
    chunks = sample(network, timeline, plan)
    period = preset.window - preset.sink  # chunks after which the ring is where it was
    early = 2 * period
    count = 200 if name == "window" else early + 5 * period
    later = early + (count - early) // period * period
    sizes = {}
    for number in range(1, later + 1):
        next(chunks)
        if number in (early, later):
            sizes[number] = held(rollouts[0])
    chunks.close()
    assert later > early
    assert sizes[early] == sizes[later]


def test_nothing_that_the_writer_holds_grows_but_the_file(tmp_path: Path) -> None:
    frames, sizes = np.zeros((4, 16, 16, 3), np.uint8), []
    with VideoWriter(tmp_path / "a.mp4", 16, 16, metadata={"prompt": "a"}, indexed=False) as video:
        for _ in range(12):
            video.write(frames)
            sizes.append((held(video), video.finished))
    assert len({size for size, _ in sizes}) == 1
    assert sizes[-1][1] == (tmp_path / "a.mp4").stat().st_size  # finished without an index
    kinds = [kind for kind, _ in boxes((tmp_path / "a.mp4").read_bytes())]
    assert kinds == [b"ftyp", b"moov", *[b"moof", b"mdat"] * 12]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_times_in_a_file_are_exact_after_years(tmp_path: Path) -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 16, 16, indexed=False) as video:
        video.write(frames)
        video.encoder.frames = 1 << 34  # 34 years at 16 frames a second
        video.write(frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        times = [16 * packet.pts * stream.time_base for packet in container.demux() if packet.size]
    assert times == [0, 1, 1 << 34, (1 << 34) + 1]


def test_noise_and_chunks_go_on_for_ever(network, context) -> None:
    """Frames beyond 32 bits have a noise and a position of their own."""
    start = 3 * (1 << 33)
    chunk = replace(plan_chunks(PRESET, 3)[1][0], index=1 << 33, start=start)
    plan = RunPlan(PRESET, None, 4, 4)
    rollout = Rollout.of(network, context, plan, sampling.WhiteNoise(0))
    with torch.no_grad():
        x = rollout.draw(chunk, chunk.levels[0])
        assert rollout.predict(x, chunk.levels[0], chunk).isfinite().all()
    other = replace(chunk, start=start + 1)
    assert not torch.equal(x, rollout.draw(other, chunk.levels[0]))
