"""Decoding and encoding beside sampling: the files of a run in turn, and no thread left behind."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from autorefiner.refiner import beside
from autorefiner.refiner import generate as generating
from autorefiner.refiner.beside import Stage, take_over
from autorefiner.refiner.cli import main
from autorefiner.refiner.generate import generate, load_network, load_vae, make_context
from autorefiner.refiner.job import Job, prepare
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.sample import sample
from autorefiner.refiner.video import VideoWriter, read_frames, to_frames
from autorefiner.refiner.wan.vae import DecoderState, WanVAE

from tiny_command import FRAMES, command, parse

SOON = 60  # seconds until a test that waits for another thread fails
COUNTS = [9, 21, FRAMES]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"test", "write video", "decode video"}


@pytest.fixture(params=["encoding", "decoding"])
def where(request, monkeypatch) -> str:
    """Decode in line as on a CPU, or in a thread as on a GPU."""
    decodes_beside = request.param == "decoding"
    monkeypatch.setattr(Job, "decodes_beside", property(lambda job: decodes_beside))
    return request.param


class Room(threading.Semaphore):
    """Tells when somebody waits for it."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.full = threading.Event()

    def acquire(self, timeout: float) -> bool:
        acquired = super().acquire(timeout=0.01)
        if not acquired:
            self.full.set()
        return acquired


class Interrupted(threading.Event):
    """Ctrl-C comes while somebody waits; the wait after that lets the work go on."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.interrupted = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        self.gate.set()
        return super().wait(timeout)


def test_items_are_done_in_order_and_without_gradients() -> None:
    done = []
    with Stage(lambda item: done.append((item, torch.is_grad_enabled())), "test") as stage:
        for item in range(20):
            stage.put(item)
    assert done == [(item, False) for item in range(20)]


@pytest.mark.parametrize("most", [1, 2])
def test_only_so_many_items_are_held(most: int, monkeypatch) -> None:
    handed, seen = [], []
    monkeypatch.setattr(threading, "Semaphore", Room)

    def work(item: int) -> None:
        if not item:
            assert stage.room.full.wait(SOON)
            seen.append(len(handed))

    stage = Stage(work, "test", most=most)
    with stage:
        for item in range(most + 2):
            stage.put(item)
            handed.append(item)
    assert seen and seen[0] <= most


def test_an_error_drops_later_items_and_comes_back_once() -> None:
    done, broken, gate = [], ValueError("no ink"), threading.Event()

    def work(item: int) -> None:
        assert gate.wait(SOON)
        if item == 1:
            raise broken
        done.append(item)

    with pytest.raises(ValueError, match="ink") as raised, Stage(work, "test", most=4) as stage:
        for item in range(50):
            stage.put(item)
            if item == 3:
                gate.set()
    assert raised.value is broken
    assert done == [0]


def test_an_error_of_the_last_item_ends_the_stage() -> None:
    def work(item: int) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Stage(work, "test") as stage:
        stage.put(0)


def test_a_thread_that_cannot_begin_blocks_nobody(monkeypatch) -> None:
    handed = threading.Event()

    def fail(device: torch.device) -> None:
        assert handed.wait(SOON)
        raise RuntimeError("no stream")

    monkeypatch.setattr(beside, "own_stream", fail)
    with pytest.raises(RuntimeError, match="stream"), Stage(print, "test") as stage:
        stage.put(0)
        handed.set()
        stage.put(1)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_error_elsewhere_lets_what_was_put_finish(error: type) -> None:
    done, gate = [], threading.Event()

    def work(item: int) -> None:
        assert gate.wait(SOON)
        done.append(item)
        if item == 1:
            raise OSError("full")  # less than the error elsewhere

    def run() -> None:
        with Stage(work, "test", most=2) as stage:
            stage.put(0)
            stage.put(1)
            gate.set()
            raise error("elsewhere")

    with pytest.raises(error, match="elsewhere"):
        run()
    assert done == [0, 1]


def test_an_interrupt_while_leaving_drops_what_has_not_begun() -> None:
    done, done_event = [], Interrupted()

    def work(item: int) -> None:
        assert done_event.gate.wait(SOON)
        done.append(item)

    stage = Stage(work, "test", most=3)
    stage.done = done_event
    with pytest.raises(KeyboardInterrupt), stage:
        for item in range(3):
            stage.put(item)
        while stage.items.qsize() > 2:  # until the first has begun
            pass
    assert done == [0]
    assert not stage.thread.is_alive()


def test_memory_of_a_tensor_on_a_gpu_is_kept_for_the_stream_that_takes_it(monkeypatch) -> None:
    calls = []

    class OnGpu(Tensor):
        is_cuda = True

        def record_stream(self, stream: str) -> None:
            calls.append(stream)

    class Event:
        def wait(self) -> None:
            calls.append("wait")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "own")
    take_over(torch.zeros(1).as_subclass(OnGpu), Event())
    take_over(torch.zeros(1), Event())
    assert calls == ["wait", "own", "wait"]


def frames_and_latents(folder: Path) -> tuple[int, int]:
    """Return the number of frames in the partial video, and of latents in theirs."""
    latents = read_latents(folder / "fox.latents.partial.safetensors")[0]
    return len(read_frames(folder / "fox.partial.mp4")), latents.shape[2]


@torch.no_grad()
def write_in_turn(job: Job) -> None:
    """Sample, decode and write each chunk before the next, without `generate`."""
    vae, state = load_vae(job), DecoderState()
    chunks = sample(load_network(job), make_context(job), job.plan, noise=job.noise)
    with VideoWriter(job.options.out, 48, 32, metadata=job.metadata) as video:
        for x0 in chunks:
            video.write(to_frames(vae.decode(x0, state)))


def test_the_file_is_that_of_one_chunk_after_the_other(files, tmp_path, where) -> None:
    for name in ("turns", "beside"):
        (tmp_path / name).mkdir()
    jobs = [prepare(parse(command(files, tmp_path / name / "fox.mp4"))) for name in
            ("turns", "beside")]  # fmt: skip
    write_in_turn(jobs[0])
    assert list(generate(jobs[1])) == COUNTS
    turns, threads = (job.options.out.read_bytes() for job in jobs)
    assert turns == threads


def test_the_next_chunk_is_sampled_while_one_is_written(
    files, tmp_path, where, monkeypatch
) -> None:
    """Each write, or each decode, waits for a pass of the next chunk."""
    begun = [threading.Event() for _ in COUNTS]
    begun.append(begun[-1])  # nothing follows the last
    waits = iter(begun[1:])
    patched, name = (VideoWriter, "write") if where == "encoding" else (WanVAE, "decode")
    original = getattr(patched, name)

    def wait(*args: object) -> object:
        assert next(waits).wait(SOON)
        return original(*args)

    monkeypatch.setattr(patched, name, wait)
    run = generate(
        prepare(parse(command(files, tmp_path / "fox.mp4"))),
        lambda progress: begun[progress.chunk.index].set(),
    )
    assert list(run) == COUNTS


def failing(error: BaseException, at: int, original: Callable) -> Callable:
    """Return a function that raises an error in place of its call number `at`, from 1."""
    calls = []

    def run(*args: object, **options: object) -> object:
        calls.append(None)
        if len(calls) == at:
            raise error
        return original(*args, **options)

    return run


@pytest.mark.parametrize(
    ("patched", "name"), [(WanVAE, "decode"), (generating, "to_frames"), (VideoWriter, "write")]
)
@pytest.mark.parametrize("at", [2, 3])
def test_an_error_in_decoding_or_writing_is_one_line_and_leaves_the_chunks_before(
    files, tmp_path, where, monkeypatch, capsys, patched, name, at
) -> None:
    broken = failing(OSError("a broken brush"), at, getattr(patched, name))
    monkeypatch.setattr(patched, name, broken)
    assert main(command(files, tmp_path / "fox.mp4", "--save-latents")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "autorefiner: error: a broken brush"
    frames, latents = frames_and_latents(tmp_path)
    assert frames == COUNTS[at - 2]
    assert latents >= 3 * at, "latents are saved before they are decoded"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("chunk 3 is a bad one"), 2, "chunk 3 is a bad one"),
        (KeyboardInterrupt(), 130, "21 frames are in"),
    ],
)
def test_a_stop_while_a_chunk_is_written_leaves_that_chunk(
    files, tmp_path, where, monkeypatch, capsys, error, status, line
) -> None:
    stopped, write = threading.Event(), VideoWriter.write
    finite = generating.finite

    def late(video: VideoWriter, frames: np.ndarray) -> None:
        assert not video.chunks or stopped.wait(SOON)
        write(video, frames)

    def two_chunks(*args: object) -> Iterator[Tensor]:
        with closing(finite(*args)) as chunks:
            yield next(chunks)
            yield next(chunks)
            stopped.set()
            raise error

    monkeypatch.setattr(VideoWriter, "write", late)
    monkeypatch.setattr(generating, "finite", two_chunks)
    assert main(command(files, tmp_path / "fox.mp4", "--save-latents")) == status
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert frames_and_latents(tmp_path) == (21, 6)


def test_closing_early_writes_what_was_sampled(files, tmp_path, where) -> None:
    run = generate(prepare(parse(command(files, tmp_path / "fox.mp4", "--save-latents"))))
    assert next(run) == 9
    run.close()
    frames, latents = frames_and_latents(tmp_path)
    assert frames == 4 * latents - 3
    assert not (tmp_path / "fox.mp4").exists()


def test_a_count_is_no_more_than_the_file_holds(files, tmp_path, where) -> None:
    run = generate(prepare(parse(command(files, tmp_path / "fox.mp4"))))
    for frames in run:
        assert len(read_frames(tmp_path / "fox.partial.mp4")) >= frames


def test_the_chunk_after_which_it_is_stopped_is_the_last(files, tmp_path, where) -> None:
    seen: list[int] = []
    run = generate(
        prepare(parse(command(files, tmp_path / "fox.mp4"))),
        lambda progress: seen.append(progress.chunk.index),
        stop=lambda: seen[-1] == 1,
    )
    assert list(run) == COUNTS[:2]
    assert len(read_frames(tmp_path / "fox.mp4")) == 21
