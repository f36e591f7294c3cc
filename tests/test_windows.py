"""Behaviour on Windows, simulated where the tests run."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autorefiner.refiner import estimate, files, video
from autorefiner.refiner.latents import LatentWriter, read_latents

from decoding import decoded


def test_the_command_line_needs_no_module_of_unix_alone() -> None:
    code = (
        "import sys; sys.modules |= dict(fcntl=None, resource=None); import autorefiner.refiner.cli"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_free_memory_is_what_windows_says(monkeypatch) -> None:
    def fill(status) -> None:
        assert status._obj.length == 64
        status._obj.total, status._obj.free = 16 << 30, 5 << 30

    kernel = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(estimate, "sys", SimpleNamespace(platform="win32"))
    assert estimate.available_bytes(torch.device("cpu")) == 5 << 30


@pytest.fixture
def closed(monkeypatch) -> None:
    """Refuse to rename or delete a file that this process has open, as Windows does."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not list the open files")

    def refusing(act):
        def run(path, *more) -> None:
            held = [
                os.path.realpath(f"/proc/self/fd/{number}")
                for number in os.listdir("/proc/self/fd")
            ]
            assert os.path.realpath(path) not in held, f"{path} is open"
            return act(path, *more)

        return run

    monkeypatch.setattr(files, "fcntl", None)
    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.mark.usefixtures("closed")
def test_a_video_and_its_latents_are_closed_before_they_are_renamed(tmp_path) -> None:
    chunk = torch.randn(1, 16, 2, 2, 2)
    with (
        video.VideoWriter(tmp_path / "a.mp4", 16, 16) as frames,
        LatentWriter(tmp_path / "a.safetensors", (16, 2, 2), {"seed": "7"}, given=chunk) as latents,
    ):
        frames.write(np.zeros((5, 16, 16, 3), np.uint8))
        latents.write(chunk)
    assert len(decoded(tmp_path / "a.mp4")) == 5
    assert torch.equal(read_latents(tmp_path / "a.safetensors")[0], torch.cat((chunk, chunk), 2))
    with pytest.raises(KeyboardInterrupt), video.VideoWriter(tmp_path / "b.mp4", 16, 16):
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.safetensors"]
