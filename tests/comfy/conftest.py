"""Fixtures of the node tests: stand-in models, one ComfyUI server, and a note on skipped tests."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_server import RUN_SECONDS, Server, find_comfyui, install_pack
from demo_files import use_demo_files, write_base, write_demo_files
from page_browser import HOW as PAGE_HOW
from page_browser import find_chromium
from published_files import CASES, IN_COMFYUI, small_state, write_case

from autorefiner.refiner.demo import bundle

HOW = (
    "set COMFYUI_PATH to a checkout, and COMFYUI_PYTHON to its interpreter "
    "if that is not in its .venv"
)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    return write_demo_files(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def base(weights: Path, tmp_path: Path, monkeypatch) -> Path:
    """Return a ComfyUI-like folder with stand-ins under the published file names."""
    use_demo_files(weights, monkeypatch)
    write_base(tmp_path, weights)
    return tmp_path


@pytest.fixture
def stand_ins(weights: Path, monkeypatch) -> None:
    """Give the standalone host the same bundle as the server."""
    use_demo_files(weights, monkeypatch)


@pytest.fixture(scope="session")
def server(weights: Path, tmp_path_factory) -> Iterator[Server]:
    """Start one ComfyUI server with stand-in models for the whole session."""
    base = tmp_path_factory.mktemp("comfyui")
    write_base(base, weights)
    install_pack(base, weights)
    running = Server.start(*find_comfyui(), base)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> list[Path]:
    """Write weight files of several layouts, under published names and others."""
    root, state = tmp_path_factory.mktemp("published"), small_state()
    cases = {case.name: case for case in CASES if not case.large}
    return [write_case(cases[name], root / "x" / "y" / "z", state) for name in IN_COMFYUI]


@pytest.fixture(scope="session")
def inside(server: Server, weights: Path, published: list[Path]) -> dict:
    """Run inside.py with ComfyUI's interpreter; return the JSON that it prints."""
    comfyui, python = find_comfyui()
    pack = server.base / "custom_nodes" / "autorefiner"
    script = Path(__file__).with_name("inside.py")
    command = [str(python), str(script), str(comfyui), str(pack)]
    command += [str(weights / bundle.FILES[name]) for name in ("student", "teacher")]
    command += map(str, published)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def peft_inside() -> None:
    """Skip where ComfyUI's interpreter lacks peft, which training needs."""
    _, python = find_comfyui()
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('peft') is None)"
    if subprocess.run([python, "-c", found]).returncode:
        pytest.skip(f"no peft: {python} -m pip install peft")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if find_comfyui() is None:
        terminalreporter.write_line(
            f"no ComfyUI here, so nothing was tried in it: {HOW}, then pytest -m comfyui"
        )
    if find_chromium() is None:
        terminalreporter.write_line(
            f"no Chromium here, so nothing was tried of the page: {PAGE_HOW}"
        )
