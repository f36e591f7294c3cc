"""Videos of runs in the making: fragments in order, bounded, and no error that ends a run."""

import io
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from autorefiner.nodes import live
from autorefiner.nodes.live import LiveVideo, LiveVideos, Recorder
from autorefiner.refiner.schedule import Chunk
from autorefiner.refiner.wan.vae import normalized

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CHUNK = Chunk(0, 0, 3, ())
LEVELS = (0.2, 0.5, 0.8)  # of chunks


class FakeDecoder:
    """Decode each latent frame to two frames whose brightness is its first value."""

    def __init__(self, fails_at: int = 1 << 30) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, raw_1Cfhw: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of paint")
        assert raw_1Cfhw.shape[0] == 1
        return raw_1Cfhw[0, 0, :, :1, :1, None].repeat(2, 16, 16, 3)


def latents(level: float) -> Tensor:
    """Return normalised latents [2, 16, 3, 2, 2] whose first video has this raw value."""
    raw = torch.full((2, 16, 3, 2, 2), 1 - level)
    raw[0] = level
    return normalized(raw)


def record(
    decoder: Callable[[Tensor], Tensor], device: torch.device = CPU, **options: object
) -> tuple[LiveVideo, list[dict]]:
    """Record LEVELS; return the video and the records that the page got."""
    video, records = LiveVideos().begin("3", "prompt", "workflow"), []
    announced = options.pop("announce", lambda video: records.append(video.record()))
    with Recorder(video, lambda: decoder, announced, device, **options) as recorder:
        for level in LEVELS:
            recorder.add(CHUNK, latents(level))
    return video, records


def brightness(data: bytes) -> list[float]:
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24").mean() / 255 for frame in container.decode()]
    return np.round(frames, 1).tolist()


@pytest.fixture
def beside(monkeypatch) -> torch.device:
    """Return a device whose chunks are decoded in a worker thread."""
    monkeypatch.setattr(live, "own_stream", lambda device: nullcontext())
    return CUDA


def test_every_chunk_is_announced_and_all_play_in_order() -> None:
    video, records = record(FakeDecoder())
    assert [given["fragments"] for given in records] == [1, 2, 3, 3]
    assert [given["ended"] for given in records] == [False, False, False, True]
    assert records[0]["codec"].startswith("avc1.") and records[0]["seconds"] == 6 / 16
    assert records[0]["first"] > 0 and records[-1]["note"] == ""
    data, count = video.data()
    assert brightness(data) == [level for level in LEVELS for _ in range(6)] and count == 3


def test_a_page_gets_what_it_lacks() -> None:
    video, _ = record(FakeDecoder())
    (first, count), (rest, end) = video.data(0, 1), video.data(1)
    assert (count, end) == (1, 3) and first + rest == video.data()[0]
    assert video.data(3) == (b"", 3) and video.data(9) == (b"", 9)


def test_a_worker_thread_records_the_same(beside: torch.device) -> None:
    threads = []

    def decoder(raw: Tensor) -> Tensor:
        threads.append(threading.current_thread())
        return FakeDecoder()(raw)

    assert record(decoder, beside)[0].data() == record(FakeDecoder())[0].data() != (b"", 0)
    assert threads[0] is not threading.main_thread() and not threads[0].is_alive()


def test_an_interrupted_run_ends_its_worker(beside: torch.device) -> None:
    decoder, go = FakeDecoder(), threading.Event()
    video = LiveVideo("3", "prompt", None)

    def slow(raw: Tensor) -> Tensor:
        assert go.wait(60)
        return decoder(raw)

    def leave() -> None:
        while not one.closed:
            time.sleep(0.01)
        go.set()

    def announce(video: LiveVideo) -> None:
        if video.ended:
            ended.append(video.key)

    ended: list[str] = []
    with pytest.raises(KeyboardInterrupt), Recorder(video, lambda: slow, announce, beside) as one:
        for level in LEVELS:
            one.add(CHUNK, latents(level))
        threading.Thread(target=leave).start()  # the first chunk is being decoded at the exit
        raise KeyboardInterrupt
    assert not one.worker.is_alive() and decoder.calls <= 1 and ended == [video.key]


def test_an_interrupt_is_seen_while_the_last_chunks_are_decoded(beside: torch.device) -> None:
    go = threading.Event()

    def interrupted() -> None:
        go.set()
        raise KeyboardInterrupt

    def slow(raw: Tensor) -> Tensor:
        assert go.wait(60)
        return FakeDecoder()(raw)

    with pytest.raises(KeyboardInterrupt):
        record(slow, beside, uninterrupted=interrupted)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_ends_the_video_and_not_the_run(fails_at: int) -> None:
    decoder = FakeDecoder(fails_at)
    video, records = record(decoder)
    assert decoder.calls == fails_at and len(video.fragments) == fails_at - 1
    assert "out of paint" in records[-1]["note"] and records[-1]["ended"]


def test_a_vae_that_cannot_be_opened_is_a_note() -> None:
    def refuse() -> None:
        raise ValueError("not Wan2.1's")

    video = LiveVideo("3", "prompt", None)
    with Recorder(video, refuse, lambda video: None, CPU) as recorder:
        recorder.add(CHUNK, latents(0.5))
    assert "Wan2.1" in video.note and video.ended and not video.fragments


def test_pixels_that_are_not_finite_are_a_note() -> None:
    video, _ = record(lambda raw: torch.full((4, 16, 16, 3), torch.nan))
    assert "NaN" in video.note and not video.fragments


def test_what_is_held_of_a_run_is_limited() -> None:
    decoder = FakeDecoder()
    video, records = record(decoder, most=1)
    assert len(video.fragments) == decoder.calls == 1 and "MiB" in records[-1]["note"]


def test_the_runs_that_are_held_are_limited() -> None:
    videos = LiveVideos(2)
    first, second, third = (videos.begin(node, "prompt", "a") for node in "344")
    assert videos.get(first.key) is None and videos.get(second.key) is second
    assert videos.of_workflow("a") == [third] and videos.of_workflow("b") == []


def test_a_run_may_begin_while_the_page_asks_for_videos() -> None:
    class Asked(str):
        def __eq__(self, other: object) -> bool:
            videos.begin("4", "prompt", "b")
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    videos = LiveVideos()
    one, other = (videos.begin(node, "prompt", Asked("a")) for node in "35")
    assert videos.of_workflow("a") == [one, other]


def test_without_room_the_video_follows_the_run() -> None:
    decoder, counts = FakeDecoder(), []
    video, records = record(decoder, room=False, uninterrupted=lambda: counts.append(decoder.calls))
    assert counts == [0, 1, 2] and video.data() == record(FakeDecoder())[0].data()
    assert "room" in records[0]["note"] and records[-1]["note"] == ""


def test_without_x264_nothing_is_decoded_and_a_line_says_so(monkeypatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    decoder = FakeDecoder()
    video, records = record(decoder)
    assert not decoder.calls and not video.fragments
    assert "libx264" in records[0]["note"] and records[-1]["codec"] is None
