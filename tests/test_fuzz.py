"""The fuzzing campaign detects every fault it looks for, and reports none without one."""

import argparse
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz_campaign
import pytest
from fuzz.base import Attempt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")


def raise_error(error: BaseException) -> None:
    raise error


def take_memory() -> None:
    bytearray(b"x") * (3 << 29)


def turn_forever() -> None:
    while True:
        pass


def write_into(folder: Path) -> None:
    (folder / "new").write_text("x")


ACTS = {
    "done": (lambda folder: None, ""),
    "refused": (lambda folder: raise_error(ValueError("no")), ""),
    "refused by the system": (lambda folder: raise_error(OSError("no")), ""),
    "refused by argparse": (lambda folder: raise_error(SystemExit(2)), ""),
    "reads its own": (lambda folder: (folder / "own").read_text(), ""),
    "error": (lambda folder: raise_error(KeyError("x")), "traceback"),
    "lines": (lambda folder: raise_error(ValueError("a\nb")), "traceback"),
    "status": (lambda folder: os._exit(3), "traceback"),
    "aborts": (lambda folder: os.abort(), "signal"),
    "turns": (lambda folder: turn_forever(), "hang"),
    "waits": (lambda folder: time.sleep(30), "hang"),
    "takes memory": (lambda folder: take_memory(), "blow-up"),
    "escapes": (lambda folder: os.write(1, b"\x1b[2J"), "steers"),
    "overrides": (lambda folder: os.write(2, "\u202e".encode()), "steers"),
    "reads": (lambda folder: (folder.parent / "secret" / "x").read_text(), "outside"),
    "reads behind Python's back": (
        lambda folder: ctypes.CDLL(None).open(b"../secret/x", 0),
        "outside",
    ),
    "writes": (lambda folder: write_into(folder.parent / "secret"), "outside"),
    "writes elsewhere": (lambda folder: write_into(folder.parent.parent), "outside"),
    "runs code": (lambda folder: (folder / "ran").touch(), "code"),
}


@pytest.mark.parametrize("kind", ACTS)
def test_a_fault_is_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act, expected = ACTS[kind]
    findings = findings_of(act, expected == "hang", tmp_path, monkeypatch)
    assert findings.inputs == {"one": 1} and findings.refused == ("refused" in kind)
    assert len(findings.faults) == bool(expected)
    assert all(expected in fault for fault in findings.faults)


def test_memory_is_seen_beside_files_that_the_campaign_has_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(600 << 20)
    with sparse.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])  # resident here, and in no fork
        act, _ = ACTS["takes memory"]
        (fault,) = findings_of(act, False, tmp_path, monkeypatch).faults
    assert "blow-up" in fault


def findings_of(
    act: Callable[[Path], object], hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> fuzz_campaign.Findings:
    """Run a campaign of this one input, which may hang."""
    root = tmp_path / "root"
    for name in ("pristine", "secret"):
        (root / name).mkdir(parents=True)
    (root / "secret" / "x").write_text("x")
    (root / "pristine" / "own").write_text("x")
    monkeypatch.setattr(
        fuzz_campaign,
        "KINDS",
        {"one": (1, lambda folder, choose: Attempt("x", lambda: act(folder)))},
    )
    monkeypatch.setattr(fuzz_campaign, "SECONDS", 1 if hangs else 60)
    monkeypatch.setattr(fuzz_campaign, "WALL", 3 if hangs else 300)
    args = argparse.Namespace(only=None, seed=0, minutes=1, keep=False)
    return fuzz_campaign.work(range(1), args, root, root / "pristine")
