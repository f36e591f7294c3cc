"""`benchmarks/gpu.py` rehearsed on the CPU: every section runs, and a stopped run goes on."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu
import gpu_acceleration
import gpu_attention
import gpu_decoding
import gpu_sections
import gpu_stores

KIT = gpu_sections.Kit(torch.device("cpu"), "rehearsal", "rehearsal", torch.float32, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(gpu_sections, "ROUNDS", 1)
    monkeypatch.setattr(gpu_sections, "measure_matmul", lambda *_: (1.0, 2.0))
    short = [
        gpu_sections.Setting(name, 4, 1, chunk, batch)
        for name, chunk, batch in (("a", 3, 1), ("b", 3, 1), ("c", 1, 1), ("d", 3, 2))
    ]
    monkeypatch.setattr(gpu_sections, "SETTINGS", short)
    monkeypatch.setattr(gpu_stores, "SETTINGS", short)
    monkeypatch.setattr(gpu_decoding, "SETTINGS", short)
    monkeypatch.setattr(gpu_acceleration, "SETTINGS", short)
    monkeypatch.setattr(gpu_attention, "SETTINGS", short)
    monkeypatch.setattr(gpu_decoding, "MARKS", (2, 4))
    monkeypatch.setitem(gpu_sections.SIZES, "long", gpu_sections.SIZES["rehearsal"])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes seconds


@pytest.mark.parametrize("section", [name for name in gpu.SECTIONS if name != "golden"])
def test_a_section_runs(section: str) -> None:
    result = gpu.measure(KIT, section)["result"]
    assert "error" not in result
    assert json.loads(json.dumps(result)) == result
    figures = [each for value in result.values() for each in figures_of(value)]
    assert all(figure >= 0 for figure in figures)
    assert section in ("card", "non_finite") or any(figure > 0 for figure in figures)


def figures_of(value: object) -> list[float]:
    if isinstance(value, dict):
        return [each for one in value.values() for each in figures_of(one)]
    return [value] if isinstance(value, int | float) else []


def test_memory_that_grows_is_not_flat(monkeypatch) -> None:
    figures = iter(
        [{"reserved_mb": 100.0, "unused_mb": 9.0}, {"reserved_mb": 100.0, "unused_mb": 30.0}]
    )
    monkeypatch.setattr(gpu_decoding, "memory_use", lambda kit: next(figures))
    assert gpu_decoding.fragmentation(KIT)["flat"] is False


def test_what_no_tensor_uses_is_counted_on_a_gpu(monkeypatch) -> None:
    current = {"allocated": 5, "reserved": 8, "inactive_split": 1}
    stats = {f"{name}_bytes.all.current": mb * 10**6 for name, mb in current.items()}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "memory_stats", lambda device: {**stats, "num_alloc_retries": 2}
    )
    assert gpu_decoding.memory_use(gpu_sections.Kit(torch.device("cuda"))) == {
        "allocated_mb": 5.0,
        "reserved_mb": 8.0,
        "unused_mb": 3.0,
        "inactive_split_mb": 1.0,
        "alloc_retries": 2,
    }


def test_golden_cases_have_limits_in_both_dtypes() -> None:
    (path,) = [each for each in gpu_sections.golden_files("vae")]
    pairs = gpu_sections.golden_pairs(path, KIT.device, torch.bfloat16)
    assert 1e-4 < max(gpu_sections.relative_distance(*pair) for pair in pairs) < 2e-2


def test_products_in_fp8_are_skipped_or_measured(monkeypatch) -> None:
    """On a CPU they are skipped with the reason; here they are measured by the reference."""
    (path,) = [each for each in gpu_sections.golden_files("forward") if "first" in each.stem]
    models = gpu_sections.Models.of(KIT)
    setting = gpu_sections.SETTINGS[1]
    assert all(
        "skipped" in each for each in gpu_sections.sampling_fp8(KIT, models, setting).values()
    )
    assert "skipped" in gpu_sections.golden_fp8(KIT, path)
    monkeypatch.setattr(gpu_sections, "multiplies_fp8", lambda device: True)
    with torch.no_grad():
        results = gpu_sections.sampling_fp8(KIT, models, setting)
    assert set(results) == {"b: base, fp8", "b: pending, merged, fp8"}
    assert all(each["chunk_ms"] > 0 for each in results.values())
    result = gpu_sections.golden_fp8(KIT, path)
    assert result["passes"] and result["difference"] > 1e-2


def test_every_way_makes_the_plain_clip() -> None:
    """Compiling is left out here, and a CPU replays nothing: the ways differ by RoPE's rounding."""
    results = gpu_acceleration.acceleration(KIT)
    assert len(results) == 3 * len(gpu_acceleration.WAYS) + 2 + 1
    for name, figures in results.items():
        assert name == "fp8" or figures["difference"] < 1e-5
        assert name == "fp8" or (figures["compile_s"] > 0) == ("compile" in name)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    calls = []

    def section(name: str):
        def run(kit):
            calls.append(name)
            if name == "broken":
                raise RuntimeError("out of memory")
            return {"figure": 1.0}

        return run

    sections = {name: section(name) for name in ("one", "broken", "late")}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    command = ["gpu.py", "--device", "cpu", "--size", "rehearsal", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--sections", "one", "broken"])
    assert gpu.main() == 1
    assert "late: not measured" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--minutes", "0"])
    gpu.main()
    assert calls == ["one", "broken"]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    assert calls == ["one", "broken", "late"]
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert results["broken"]["result"] == {"error": "RuntimeError: out of memory"}
    assert list(results) == ["one", "broken", "late"]
