"""Imports inside nodes/ form no circle, and both hosts satisfy NodeHost."""

import ast
import inspect
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from node_host import mismatches

import autorefiner
from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.hosts.protocol import NodeHost

NODES = Path(autorefiner.__file__).parent / "nodes"
HOSTS = NODES / "hosts"
FUNCTIONS = dict(inspect.getmembers(NodeHost, inspect.isfunction))
CALLED_NAMES = {name for name in FUNCTIONS if not name.startswith("_")}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Return every statement, also inside functions, but not under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from statements(node)


def dependencies(path: Path, root: Path) -> set[str]:
    """Return the modules under `root` that a file imports, and the packages run before them."""
    folder = path.relative_to(root).parent.parts
    package = ".".join((*folder, "__init__"))
    found = set() if path.name == "__init__.py" else {package}
    for node in statements(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not 1 <= node.level <= len(folder) + 1:
            continue
        base = [*folder[: len(folder) + 1 - node.level], *(node.module or "").split(".")]
        place = root.joinpath(*filter(None, base))
        for name in [alias.name for alias in node.names]:
            options = (place / f"{name}.py", place.with_suffix(".py"), place / "__init__.py")
            module = next(option for option in options if option.exists())
            found.add(".".join(module.relative_to(root).with_suffix("").parts))
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): dependencies(path, root)
        for path in root.rglob("*.py")
    }


def circle(root: Path) -> list[str]:
    """Return modules that import each other in turn; empty if there are none."""
    try:
        TopologicalSorter(import_graph(root)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_go_round_in_no_circle() -> None:
    assert not circle(NODES)


@pytest.mark.parametrize(
    ("back", "is_circle"),
    [
        ("from ..a import f", True),
        ("def f():\n    from .. import a", True),
        ("from ...a import f", False),  # `a` of another package
        ("if TYPE_CHECKING:\n    from ..a import f", False),
    ],
)
def test_a_circle_is_found_in_functions_too(back: str, is_circle: bool, tmp_path: Path) -> None:
    (tmp_path / "hosts").mkdir()
    for name in ("__init__.py", "hosts/__init__.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "a.py").write_text("from .hosts import b")
    (tmp_path / "hosts" / "b.py").write_text(back)
    assert bool(circle(tmp_path)) == is_circle


def test_hosts_import_no_node_file() -> None:
    graph = import_graph(NODES)
    node_files = {module for module, imported in graph.items() if "api" in imported} | {"api"}
    hosts = {module for module in graph if module.startswith("hosts.")}
    assert len(node_files) > 10 and len(hosts) > 10
    assert not {
        module: graph[module] & node_files for module in hosts if graph[module] & node_files
    }


def test_the_protocol_is_what_nodes_call_and_no_more() -> None:
    called = {
        node.attr
        for path in NODES.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "host"
    }
    assert called == CALLED_NAMES


def test_the_host_without_comfyui_has_every_function() -> None:
    assert not mismatches(NodeHost, standalone)


def functions_of_comfy_host() -> dict[str, ast.FunctionDef]:
    """Return the functions that hosts/comfy.py defines or imports from its neighbours."""
    body = ast.parse((HOSTS / "comfy.py").read_text()).body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            neighbour = ast.parse((HOSTS / f"{node.module}.py").read_text()).body
            defined = {item.name: item for item in neighbour if isinstance(item, ast.FunctionDef)}
            functions |= {
                alias.name: defined[alias.name] for alias in node.names if alias.name in defined
            }
    return functions


def parameters_of(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Return (name, default) of each positional parameter, defaults as source."""
    arguments = function.args
    assert not (
        arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs
    )
    names = [argument.arg for argument in arguments.args if argument.arg != "self"]
    defaults = [ast.unparse(default) for default in arguments.defaults]
    return list(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))


def test_the_host_in_comfyui_has_every_function() -> None:
    """Reads the source, as ComfyUI is missing; test_inside_comfyui.py checks the module."""
    source = ast.parse((HOSTS / "protocol.py").read_text())
    (protocol,) = (node for node in source.body if isinstance(node, ast.ClassDef))
    functions = functions_of_comfy_host()
    for method in protocol.body:
        if isinstance(method, ast.FunctionDef):
            assert method.name in functions, method.name
            assert parameters_of(method) == parameters_of(functions[method.name]), method.name


class Incomplete:
    """A host that lacks most functions and has one with another parameter."""

    @staticmethod
    def show(line: str) -> None: ...

    @staticmethod
    def notice(text: str, loud: bool = False) -> None: ...


def test_a_host_of_other_signatures_is_found_out() -> None:
    found = mismatches(NodeHost, Incomplete)
    assert set(found) == CALLED_NAMES - {"notice"}
    assert "line" in found["show"] and "missing" in found["sample"]
