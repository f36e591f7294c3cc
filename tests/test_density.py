"""benchmarks/density.py: what it counts, and when its check fails."""

import subprocess
import sys
from pathlib import Path

import pytest

DENSITY = Path(__file__).parent.parent / "benchmarks" / "density.py"
SOURCE = '''"""A docstring,
of two lines."""

# a comment
def f(x):  # a comment behind code
    """Another."""
    text = """two
      lines"""
    return x + 1
'''
CODE = ["def f(x):", 'text = """two', 'lines"""', "return x + 1"]


def measure(room: Path, source: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a copy of the script on one file in refiner/ and one in nodes/."""
    for name in ("benchmarks", "refiner", "nodes"):
        (room / name).mkdir(exist_ok=True)
    (room / "benchmarks" / "density.py").write_bytes(DENSITY.read_bytes())
    (room / "refiner" / "a.py").write_text(source)
    (room / "nodes" / "b.py").write_text("y = 1\n")
    command = [sys.executable, str(room / "benchmarks" / "density.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_counts_code_without_comments_and_docstrings(tmp_path: Path) -> None:
    ran = measure(tmp_path, SOURCE, "--check")
    assert ran.returncode == 0, ran.stderr
    (row,) = (line.split() for line in ran.stdout.splitlines() if line.startswith("refiner/"))
    width = sum(map(len, CODE)) / len(CODE)
    assert row[1:5] == ["1", "1", str(len(CODE)), f"{width:.1f}"]
    assert row[6:] == ["5", "5", "9", "a.py"]


@pytest.mark.parametrize("source", ["x = 1\n" * 451, f"{'x' * 90} = 1\n"])
def test_its_check_fails_beyond_a_limit(source: str, tmp_path: Path) -> None:
    assert measure(tmp_path, source).returncode == 0
    ran = measure(tmp_path, source, "--check")
    assert ran.returncode == 1 and "at most" in ran.stderr
