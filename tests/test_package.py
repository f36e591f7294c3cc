"""The installed package and the external modules that it may import."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import autorefiner
from autorefiner.refiner.training.precision import allow_recompiling
from autorefiner.refiner.wan import linear

ROOT = Path(autorefiner.__file__).parent
SOURCES = sorted((ROOT / "refiner").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
COMFYUI = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "latent_preview",
    "server",
)
FOREIGN = (*COMFYUI, "nodes", "autorefiner", "refiner")


def imports(path: Path) -> list[tuple[int, str]]:
    """Return (level, module) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


# Standard library names newer than Python 3.10, the oldest supported version.
NEW_MODULES = {"tomllib"}
NEW_NAMES = {
    "datetime": {"UTC"},
    "typing": {"Self", "LiteralString", "assert_never", "Never", "NotRequired", "Unpack"},
    "enum": {"StrEnum", "verify"}, "contextlib": {"chdir"}, "hashlib": {"file_digest"},
    "itertools": {"batched"}, "asyncio": {"TaskGroup", "timeout", "Runner"}, "operator": {"call"},
    "math": {"cbrt", "exp2", "sumprod"}, "pathlib": {"UnsupportedOperation"},
    "warnings": {"deprecated"}, "inspect": {"getmembers_static"},
    "string": {"Template.get_identifiers"},
    "builtins": {"ExceptionGroup", "BaseExceptionGroup", "aiter"},
}  # fmt: skip


def newer_than_promised(source: str) -> list[str]:
    """Return uses of Python 3.11 and newer outside of branches on the version."""
    tree = ast.parse(source)
    branches = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "version_info" in ast.dump(node.test)
    ]
    guarded = {id(inner) for branch in branches for inner in ast.walk(branch)}
    found = []
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in NEW_MODULES]
        if isinstance(node, ast.ImportFrom):
            names = NEW_NAMES.get(node.module or "", set())
            found += [
                alias.name
                for alias in node.names
                if alias.name in names or node.module in NEW_MODULES
            ]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [node.attr] if node.attr in NEW_NAMES.get(node.value.id, set()) else []
        if isinstance(node, ast.Name) and node.id in NEW_NAMES["builtins"]:
            found.append(node.id)
    return found


def test_nothing_newer_than_the_promised_python_is_used() -> None:
    assert newer_than_promised("import tomllib") == ["tomllib"]
    assert newer_than_promised("import datetime\ndatetime.UTC\nfrom typing import Self") == [
        "Self",
        "UTC",
    ]
    found = {
        str(path.relative_to(ROOT)): newer_than_promised(path.read_text())
        for path in SOURCES + NODES
    }
    assert not {path: names for path, names in found.items() if names}


# Removes what older versions of torch lack, then imports the core and the command line.
OLD_TORCH = """
import importlib, pkgutil, torch, torch._dynamo
del torch.optim.Muon
torch.ops.mkldnn.__dict__.pop("_is_mkldnn_bf16_supported", None)
type(torch.ops.mkldnn).__getattr__ = lambda self, name: (_ for _ in ()).throw(AttributeError(name))
import autorefiner.refiner, autorefiner.nodes.cli
for module in pkgutil.walk_packages(autorefiner.refiner.__path__, "autorefiner.refiner."):
    if module.name != "autorefiner.refiner.training.muon":
        importlib.import_module(module.name)
from autorefiner.refiner.training.learner import Learner
from autorefiner.refiner.training.precision import multiplies_bf16
assert not multiplies_bf16(torch.device("cpu"))
Learner(torch.nn.Linear(2, 2), 0.1, 0.0)
try:
    Learner(torch.nn.Linear(2, 2), 0.1, 0.0, muon=0.1)
except ValueError as error:
    print("2.9" in str(error))
"""


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch is such an old one")
def test_an_older_torch_is_enough_for_all_but_what_needs_muon() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", OLD_TORCH], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "True\n"), ran.stderr


@pytest.mark.parametrize("name", ["recompile_limit", "cache_size_limit"])
def test_the_limit_of_compilations_is_set_by_either_name(monkeypatch, name: str) -> None:
    config = SimpleNamespace(**{name: 8})
    monkeypatch.setattr(torch._dynamo, "config", config)
    allow_recompiling(64)
    assert vars(config) == {name: 64}
    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace())
    allow_recompiling(64)  # a torch with neither is unchanged


def test_a_linear_layer_needs_no_onednn(monkeypatch) -> None:
    layer, x = linear.Linear(8, 4), torch.randn(3, 8)
    expected = layer(x)
    monkeypatch.setattr(linear, "_HAS_ONEDNN", False)
    monkeypatch.setattr(linear, "_multiply", None)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_every_folder_of_the_package_is_installed() -> None:
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    names = set(re.findall(r'"([\w.]+)"', listed[1]))
    folders = {
        path.parent.relative_to(ROOT) for path in SOURCES + NODES if path.name == "__init__.py"
    }
    assert names == {
        "autorefiner",
        *(".".join(("autorefiner", *folder.parts)) for folder in folders),
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_no_host(path: Path) -> None:
    """For imports between rooms of the core, see test_rooms.py."""
    found = imports(path)
    assert not [module for level, module in found if level == 0 and module.split(".")[0] in FOREIGN]


HOSTS = ROOT / "nodes" / "hosts"
COMFY_HOST = [*HOSTS.glob("comfy*.py"), HOSTS / "page.py", HOSTS / "live_route.py"]


@pytest.mark.parametrize("path", NODES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_its_host_imports_comfyui_and_nodes_import_relatively(path: Path) -> None:
    absolute = [module.split(".")[0] for level, module in imports(path) if level == 0]
    assert not {"nodes", "autorefiner", "refiner"} & set(absolute)
    if path not in COMFY_HOST:
        assert not set(COMFYUI) & set(absolute)
