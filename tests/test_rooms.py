"""The rooms of the package: what each may import; modules of the core form no circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import autorefiner

ROOT = Path(autorefiner.__file__).parent
CORE = ROOT / "refiner"
FILES = sorted(CORE.rglob("*.py"))

# Each room (a folder or file of refiner/) and the rooms that it may import.
TOOLS = {"files", "reading", "stopping", "terminal"}
NETWORK = {"wan", "memory", "schedule"}
PLANS = {"run_plan", "timeline"}
SAMPLING = NETWORK | PLANS | {"noise", "rollout", "samplers", "estimate", "sample"}
MEDIA = {"fragments", "latents", "outputs", "pictures", "video"}
PROMPTS = {"prompt_timeline", "timeline_text"}
TRAINED = SAMPLING | MEDIA | TOOLS | PROMPTS
ROOMS = {
    "schedule": set(),
    **{tool: set() for tool in TOOLS},
    "wan": TOOLS,
    "memory": {"wan", "reading"},
    "noise": NETWORK,
    "timeline": {"memory", "schedule"},
    "run_plan": NETWORK | {"choices"},
    "timeline_text": NETWORK | {"timeline"},
    "prompt_timeline": NETWORK | PLANS | {"timeline_text"},
    "rollout": NETWORK | PLANS | {"noise"},
    "samplers": NETWORK | {"rollout", "timeline"},
    "estimate": {"wan", "memory"},
    "sample": SAMPLING,
    "acceleration": {"wan", "memory", "noise"},
    "recipe": NETWORK | {"noise", "run_plan"},
    "refiner_plan": NETWORK | {"noise"},
    "latents": TOOLS | {"schedule", "estimate"},
    "outputs": TOOLS | {"latents"},
    "pictures": TOOLS,
    "beside": {"stopping"},
    "fragments": set(),
    "video": TOOLS | {"estimate", "fragments"},
    "training": TRAINED,
    "demo": TRAINED | {"training", "choices"},
    "bundles": TRAINED | {"training", "demo"},
    "choices": set(),
    "device": set(),
    "preset_table": {"schedule"},
    "bench": SAMPLING | {"acceleration", "choices"},
    "bench_refiner": SAMPLING | {"acceleration", "bench"},
    "request": PROMPTS | {"acceleration", "bundles", "outputs", "refiner_plan", "wan"},
    "calibrate": TRAINED | {"generate", "job", "request"},
    "train_config": TRAINED | {"bundles", "choices", "training"},
    "verifiers": TRAINED | {"bundles", "choices", "request", "train_config", "training"},
    "job": TRAINED
    | {
        "acceleration",
        "bundles",
        "choices",
        "device",
        "recipe",
        "refiner_plan",
        "request",
        "verifiers",
    },
    "fit": TRAINED | {"job", "request"},
    "generate": TRAINED | {"beside", "job"},
    "train": TRAINED | {"bundles", "training", "train_config"},
}
ANYTHING = {"cli", "commands", "__init__"}  # may import every room


def module_name(path: Path) -> tuple[str, ...]:
    """Return refiner/wan/vae.py as (refiner, wan, vae), a package's __init__.py as its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path, statements: list[ast.stmt] | None = None) -> Iterator[tuple[str, ...]]:
    """Return the package's modules that a file imports anywhere, or only in these statements."""
    tree = ast.walk(ast.parse(path.read_text())) if statements is None else statements
    package = path.relative_to(ROOT).parent.parts
    for node in tree:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        module = base + tuple((node.module or "").split(".")) if node.module else base
        for alias in node.names:
            yield (*module, alias.name) if (*module, alias.name) in MODULES else module


def room_of(module: tuple[str, ...]) -> str:
    return module[1] if len(module) > 1 else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below(path: Path) -> None:
    module = module_name(path)
    targets = set(imported(path))
    assert not {".".join(target) for target in targets if target[0] != "refiner"}
    room = room_of(module)
    if room in ANYTHING:
        return
    assert room in ROOMS, f"{room} is a new room: say in ROOMS what it may import"
    forbidden = {room_of(target) for target in targets} - ROOMS[room] - {room}
    assert not forbidden


def test_no_room_below_reaches_the_trainings_or_the_demo() -> None:
    """The table itself is ordered: no room may import one that may import it."""
    for room, allowed in ROOMS.items():
        assert not [below for below in allowed - {room} if room in ROOMS[below] - {below}]
    below = {"wan", "memory", "noise", "samplers", "rollout", "schedule", "sample", "estimate"}
    assert not [room for room in below if ROOMS[room] & {"training", "demo", "bundles"}]
    assert not ROOMS["demo"] & {"generate", "train", "train_config", "cli", "job", "bundles"}


def top_level(path: Path) -> list[ast.stmt]:
    """Return the statements that run on import: not functions, not TYPE_CHECKING blocks."""
    statements, tree = [], ast.parse(path.read_text()).body
    while tree:
        node = tree.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        statements.append(node)
        for part in ("body", "handlers", "orelse", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                tree += getattr(node, part, [])
    return statements


def circle(graph: dict[tuple[str, ...], set[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Return modules that import each other in turn; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_modules_of_the_core_form_no_circle() -> None:
    a, b, c = ("a",), ("b",), ("c",)
    assert set(circle({a: {b}, b: {a}, c: {a}})) == {a, b}
    graph = {
        module: set(imported(path, top_level(path))) - {module} for module, path in MODULES.items()
    }
    assert not [".".join(module) for module in circle(graph)]
