"""What the registry reads of pyproject.toml, and the archive that it packs."""

import ast
import re
import subprocess

import pytest
from registry_archive import PACK, archived

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PYPROJECT = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]


@pytest.fixture(scope="module")
def files() -> set[str]:
    try:
        return set(archived())
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git, or no checkout")


def imported(path: str) -> set[str]:
    """Return the files, or packages, that a module of the pack imports relatively."""
    tree = ast.parse((PACK / path).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.split("/")[: -node.level]
            parts = [*base, *(node.module.split(".") if node.module else [])]
            found |= {"/".join([*parts, alias.name]) for alias in node.names}
    return found


def resolves(module: str, files: set[str]) -> bool:
    """Whether a.b.c is a module, a package, or a name in a.b."""
    parent = module.rpartition("/")[0]
    places = (module, parent) if parent else (module,)
    return any(f"{place}{end}" in files for place in places for end in (".py", "/__init__.py"))


def test_every_import_of_the_archive_is_in_the_archive(files: set[str]) -> None:
    modules = {path for path in files if path.endswith(".py")}
    assert "nodes/hosts/comfy.py" in modules and "refiner/sample.py" in modules
    missing = {
        (path, module)
        for path in modules
        for module in imported(path)
        if not resolves(module, files)
    }
    assert missing == set()


def test_the_archive_has_what_the_pack_reads_and_no_tests(files: set[str]) -> None:
    kinds = ("web/*.js", "web/*.css", "web/docs/**/*", "locales/**/*.json", "workflows/*",
             "workflows/api/*.json", "refiner/demo/weights/*")  # fmt: skip
    for kind in kinds:
        read = {str(path.relative_to(PACK).as_posix()) for path in PACK.glob(kind)}
        read = {path for path in read if (PACK / path).is_file()}
        assert read and read <= files, kind
    assert not {path for path in files if path.startswith(("tests/", "benchmarks/", "."))} - {
        ".comfyignore"
    }


def test_the_registry_finds_what_it_asks_for(files: set[str]) -> None:
    project, comfy = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", project["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (PACK / project["license"]["file"]).is_file() and project["description"]
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert all(url.startswith(REPOSITORY) for url in project["urls"].values())
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"]
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/"
    for name in ("Icon", "Banner"):
        assert comfy[name].startswith(raw)
        assert (PACK / comfy[name].removeprefix(raw)).is_file()
