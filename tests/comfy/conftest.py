"""The line at the end of a run that says how to enable the tests in ComfyUI."""

import pytest
from comfy_server import find_comfyui

HOW = "set COMFYUI_PATH to a checkout, and COMFYUI_PYTHON to its interpreter if that is not in its .venv"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if find_comfyui() is None:
        terminalreporter.write_line(f"no ComfyUI here, so nothing was tried in it: {HOW}, then pytest -m comfyui")
