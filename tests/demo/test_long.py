"""`autorefiner demo long`: rows are measured once, and joins are scored by themselves."""

from pathlib import Path

import numpy as np
import pytest
from demo_files import write_refiner

from autorefiner.refiner.cli import main
from autorefiner.refiner.demo import evaluation, long
from autorefiner.refiner.demo.bundle import REFINERS
from autorefiner.refiner.demo.clips import held_out, truth_clips
from autorefiner.refiner.demo.long import MemoryRow
from autorefiner.refiner.demo.metrics.joins import join_flicker

from tiny_bundle import SIZES, use_bundle, write_tiny_bundle


def test_a_small_version_runs_and_measures_nothing_twice(tmp_path: Path, monkeypatch) -> None:
    models = tmp_path / "models"
    write_tiny_bundle(models)
    write_refiner(models / REFINERS["sprites"], SIZES)
    use_bundle(models, monkeypatch.setattr)
    for module in (long, evaluation):
        monkeypatch.setattr(module, "WEIGHTS", models, raising=False)
    rows = (
        MemoryRow("full history"),
        MemoryRow("window 6, relative", window=6, sink=0, positions="relative"),
        MemoryRow("top", memory="top-frames:k=2"),
        MemoryRow("top, refined", memory="top-frames:k=2", refined=True),
    )
    monkeypatch.setattr(long, "ROWS", rows)
    monkeypatch.setattr(long, "LATENT_FRAMES", 5)
    monkeypatch.setattr(long, "helpers", lambda device: 0)
    run, out = tmp_path / "run", tmp_path / "RESULTS.md"
    command = ["demo", "long", "--lengths", "1:1", "--run", str(run), "--out", str(out)]
    assert main([*command, "--device", "cpu"]) == 0
    text = out.read_text()
    assert "### 1 times the trained length: 17 frames, 1 captions" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [row.name for row in rows]
    assert "`top, refined` less `top`, paired by caption: total " in text
    assert table[-1].split("|")[2:4] != table[-2].split("|")[2:4]
    files = sorted(run.iterdir())
    assert len(files) == len(rows)
    monkeypatch.setattr(long, "measure", lambda *_: pytest.fail("measured again"))
    assert main([*command, "--device", "cpu"]) == 0
    assert out.read_text() == text
    monkeypatch.setattr(long, "machine", lambda device: "a GPU")
    monkeypatch.setattr(long, "time_chunks", lambda *_: 7.0)
    assert main([*command, "--time", "--device", "cpu"]) == 0
    assert "Measured on a CPU, timed on a GPU." in out.read_text()


def test_flicker_beside_joins_alone_counts() -> None:
    clip = next(truth_clips(held_out(1))).copy()
    chunks = [3] * 7
    clean = join_flicker(clip, chunks)
    assert clean > 95
    at_joins, elsewhere = clip.copy(), clip.copy()
    at_joins[9:21] = np.clip(at_joins[9:21].astype(int) + 30, 0, 255)  # the second chunk
    elsewhere[14:16] = np.clip(elsewhere[14:16].astype(int) + 30, 0, 255)
    assert join_flicker(at_joins, chunks) < clean - 5
    assert join_flicker(elsewhere, chunks) > clean - 1
    assert np.isnan(join_flicker(clip, [21]))
