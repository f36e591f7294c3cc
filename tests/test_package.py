"""The package as it is installed and as its rooms may import each other."""

import ast
import re
from pathlib import Path

import pytest

import autorefiner

ROOT = Path(autorefiner.__file__).parent
SOURCES = sorted((ROOT / "refiner").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
COMFYUI = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "server")
FOREIGN = (*COMFYUI, "nodes", "autorefiner", "refiner")
# A room, and the rooms of refiner/ that it may not know.
LOWER_ROOMS = {
    "wan": ("memory", "noise", "samplers", "training", "demo", "rollout", "schedule", "sample", "generate"),
    "memory": ("noise", "samplers", "training", "demo", "rollout", "schedule", "sample", "generate"),
    "noise": ("samplers", "training", "demo", "rollout", "sample", "generate"),
    "samplers": ("training", "demo", "sample", "generate"),
    "training": ("demo", "generate"),
}


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_every_folder_of_the_package_is_installed() -> None:
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    names = set(re.findall(r'"([\w.]+)"', listed[1]))
    folders = {path.parent.relative_to(ROOT) for path in SOURCES + NODES if path.name == "__init__.py"}
    assert names == {"autorefiner", *(".".join(("autorefiner", *folder.parts)) for folder in folders)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_neither_a_host_nor_a_room_above(path: Path) -> None:
    found = imports(path)
    assert not [module for level, module in found if level == 0 and module.split(".")[0] in FOREIGN]
    parts = path.relative_to(ROOT / "refiner").parts
    above = LOWER_ROOMS.get(parts[0], ())
    upward = [module for level, module in found if level == len(parts) and module.split(".")[0] in above]
    assert not upward


OF_COMFYUI = ("comfy.py", "comfy_layers.py", "comfy_training.py", "comfy_video.py", "page.py")
COMFY_HOST = [ROOT / "nodes" / "hosts" / name for name in OF_COMFYUI]


@pytest.mark.parametrize("path", NODES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_its_host_imports_comfyui_and_nodes_import_relatively(path: Path) -> None:
    absolute = [module.split(".")[0] for level, module in imports(path) if level == 0]
    assert not {"nodes", "autorefiner", "refiner"} & set(absolute)
    if path not in COMFY_HOST:
        assert not set(COMFYUI) & set(absolute)
