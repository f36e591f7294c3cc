"""`benchmarks/against_self_forcing.py` rehearsed on the CPU, without the public checkouts.

SELF_FORCING_PATH=FOLDER, a checkout of guandeh17/Self-Forcing, compares with its model; its code is
executed.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import against_self_forcing as against
import contender_self_forcing
from contender import Contender, Job, Passes
from gpu_sections import Kit

KIT = Kit(torch.device("cpu"), "rehearsal", dtype=torch.float32, steady_chunks=1)
PUBLIC = os.environ.get("SELF_FORCING_PATH")


@pytest.fixture
def compare(tmp_path: Path, monkeypatch):
    """Run the command; return its exit status, its JSON and where that lies."""
    monkeypatch.setattr(against, "card", lambda kit: {"device": "cpu"})

    def run(*options: str) -> tuple[int, dict]:
        command = ["against", "--device", "cpu", "--size", "rehearsal", "--steady-chunks", "1"]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out"), *options])
        status = against.main()
        (path,) = (tmp_path / "out").glob("*-cpu-rehearsal-against.json")
        return status, json.loads(path.read_text())

    return run


def test_this_pack_has_figures_and_the_others_a_reason(compare, capsys, tmp_path: Path) -> None:
    status, results = compare("--self-forcing", str(tmp_path))
    assert status == 1
    row = results["autorefiner"]
    assert all(row[name] > 0 for name in ("pass_ms", "write_ms", "chunk_ms"))
    assert row["frames_per_second"] == pytest.approx(12e3 / row["chunk_ms"])
    assert str(tmp_path) in results["self_forcing"]["reason"]
    assert "--comfyui" in results["comfyui"]["reason"]
    printed = capsys.readouterr().out
    assert f"{row['chunk_ms']:.4g}" in printed and results["comfyui"]["reason"] in printed


@pytest.mark.parametrize("factor", [1, 1.1])
def test_a_difference_beyond_the_limit_fails(compare, monkeypatch, capsys, factor: float) -> None:
    figures = dict.fromkeys(("pass_ms", "write_ms", "chunk_ms", "frames_per_second"), 1.0)
    monkeypatch.setattr(Contender, "figures", lambda *_: figures)

    def other(folder: Path, job: Job) -> Contender:
        for tensor in job.weights.values():
            tensor.mul_(factor)
        return against.autorefiner(job)

    monkeypatch.setattr(against, "self_forcing", other)
    status, results = compare("--self-forcing", "folder")
    agrees = factor == 1
    assert results["self_forcing"]["agrees"] is agrees and status == (0 if agrees else 1)
    assert ("EXCEEDS" in capsys.readouterr().out) is not agrees


def test_a_pass_that_is_missing_is_an_error() -> None:
    passes = Passes(KIT.device)
    passes.hook(network := torch.nn.Identity())
    for _ in range(9):
        network(torch.zeros(1))
    with pytest.raises(RuntimeError, match="9 passes"):
        passes.chunk_figures(1)
    network(torch.zeros(1))
    figures = passes.chunk_figures(1)
    assert [len(figures[name]) for name in ("pass_ms", "write_ms", "chunk_ms")] == [4, 1, 1]
    assert sum(figures["pass_ms"] + figures["write_ms"]) <= figures["chunk_ms"][0]


def test_imports_of_a_checkout_leave_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise RuntimeError('not needed')")
    (tmp_path / "pipeline" / "causal_inference.py").write_text(
        "from wan.modules.t5 import umt5_xxl"
    )
    monkeypatch.setitem(sys.modules, "utils", hidden := object())
    with contender_self_forcing.importable(tmp_path):
        assert import_module("pipeline.causal_inference").umt5_xxl is None
    assert sys.modules["utils"] is hidden
    assert not {"pipeline", "pipeline.causal_inference", "wan.modules.t5"} & set(sys.modules)


@pytest.mark.skipif(not PUBLIC, reason="set SELF_FORCING_PATH to a checkout of Self-Forcing")
def test_the_public_model_agrees(compare) -> None:
    status, results = compare("--self-forcing", str(PUBLIC))
    assert status == 0
    assert results["self_forcing"]["difference"] < 1e-5
    assert results["self_forcing"]["chunk_ms"] > 0
