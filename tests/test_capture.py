"""Capturing a CUDA graph: on which device and stream. A stand-in takes the place of torch.cuda."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from autorefiner.refiner.wan import graphs
from autorefiner.refiner.wan.graphs import capture, outside_captures


class Stream:
    """A stream of a device; the usual priority deals out the same ones again."""

    def __init__(self, device: int = 0, priority: int = 0) -> None:
        self.device, self.priority = device, priority

    def wait_stream(self, other: "Stream") -> None:
        """Everything runs at once."""


class Device:
    """The current device and stream; a capture of it fails when it ends, as torch reports it."""

    def __init__(self) -> None:
        self.index, self.stream = 0, Stream()
        self.captured_on: list[Stream] = []
        self.fails = False

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def graph(self, graph: object, stream: Stream, **_: object) -> "Device":
        self.captured_on.append(stream)
        return self

    def __enter__(self) -> None:
        self.stream = self.captured_on[-1]

    def __exit__(self, *_: object) -> None:
        if self.fails:
            raise RuntimeError("CUDA error: operation failed due to a previous error")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", device.graph)
    monkeypatch.setattr(torch.cuda, "stream", device.use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device.index)
    graphs.capture_stream.cache_clear()
    yield device
    graphs.capture_stream.cache_clear()


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_leaves_the_stream_as_it_was(device: Device, fails: bool) -> None:
    here, device.fails = device.stream, fails
    if fails:
        with pytest.raises(RuntimeError, match="CUDA"):
            capture(lambda: None, 1)
    else:
        capture(lambda: None, 1)
    assert device.stream is here


def test_captures_have_a_stream_of_their_own_on_each_device(device: Device) -> None:
    """It runs the first passes, too, so workspaces do not lie in the graph's memory."""
    warm: list[Stream] = []
    for device.index in (0, 1, 0):
        capture(lambda: warm.append(device.stream), 1)
    first, second, again = device.captured_on
    assert first is again and (first.device, second.device) == (0, 1)
    assert warm[::2] == device.captured_on
    assert first.priority != Stream().priority


def test_another_thread_compiles_outside_captures(device: Device) -> None:
    order: list[str] = []
    thread = threading.Thread(target=outside_captures(lambda: order.append("compiled")))

    def captured() -> None:
        thread.start()
        thread.join(0.1)
        order.append("captured")

    capture(captured, 0)
    thread.join()
    assert order == ["captured", "compiled"]
