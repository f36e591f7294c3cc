"""Execute a workflow in ComfyUI's API format without ComfyUI, after checking all of it."""

import difflib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..refiner.reading import read_json
from .hosts.core_nodes import CORE_NODES
from .hosts.schema import ComfyNode, NodeOutput, Schema, Socket
from .registry import NODES

CLASSES: dict[str, type[ComfyNode]] = {
    node.define_schema().node_id: node for node in (*CORE_NODES, *NODES)
}
NEEDS_COMFYUI = {"AutoRefinerCustomSampler"}
LARGEST = 4 << 20  # bytes of a workflow file
LONGEST_SHOWN = 80  # characters of a name in a message
MOST_WRONG = 6  # nodes that one error names
CASTS: dict[str, Callable[[Any], Any]] = {
    "INT": int,
    "FLOAT": float,
    "STRING": str,
    "BOOLEAN": bool,
}


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a workflow."""

    id: str
    kind: str
    title: str
    inputs: dict[str, Any]

    @property
    def name(self) -> str:
        return f"node {plain(self.id)} ({plain(self.title)})"

    @property
    def schema(self) -> Schema:
        return CLASSES[self.kind].define_schema()


def plain(text: str) -> str:
    """Make a workflow's name for something fit for one line of a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:LONGEST_SHOWN])


def is_link(value: object) -> bool:
    """Whether an input's value is another node's output, [id, index]."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return isinstance(value[0], str) and isinstance(value[1], int)


def read_workflow(path: Path) -> dict[str, Node]:
    """Read the nodes of a file, by id; ValueError when it is no workflow in API format."""
    workflow = read_json(path, LARGEST)
    if isinstance(workflow, dict) and "nodes" in workflow and "links" in workflow:
        raise ValueError(
            f"{path} is a workflow of the page: give the one in workflows/api/, or save with Export"
            " (API)"
        )
    is_api = isinstance(workflow, dict) and workflow and all(map(_is_node, workflow.values()))
    if not is_api:
        raise ValueError(
            f"{path} is not a workflow in API format: give one saved with Export (API)"
        )
    return {key: _node(key, node) for key, node in workflow.items()}


def _is_node(node: object) -> bool:
    if not isinstance(node, dict):
        return False
    return isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _node(key: str, node: dict) -> Node:
    kind = node["class_type"]
    metadata = node.get("_meta")
    title = metadata.get("title") if isinstance(metadata, dict) else None
    return Node(key, kind, str(title or kind), dict(node["inputs"]))


def prompt_of(nodes: dict[str, Node]) -> str:
    """Format the nodes as JSON in API format, for the metadata of files."""
    prompt = {
        node.id: {"class_type": node.kind, "inputs": node.inputs, "_meta": {"title": node.title}}
        for node in nodes.values()
    }
    return json.dumps(prompt)


def with_values(nodes: dict[str, Node], settings: Sequence[str]) -> dict[str, Node]:
    """Apply settings `node.input=value`, with nodes by id, title or class.

    Raises ValueError, which lists the nodes or inputs that there are.
    """
    nodes = dict(nodes)
    for setting in settings:
        place, equals, text = setting.partition("=")
        where, dot, name = place.rpartition(".")
        if not equals or not dot:
            raise ValueError(
                f"--set {setting!r}: give node.input=value, like 5.seed=7 or 'Load"
                " AR-VDM.preset=causvid'"
            )
        matches = [node for node in nodes.values() if where in (node.id, node.title, node.kind)]
        if len(matches) != 1:
            listed = ", ".join(f"{plain(node.id)} ({plain(node.title)})" for node in nodes.values())
            raise ValueError(
                f"--set {setting!r}: {len(matches)} nodes are {where!r}; the nodes are {listed}"
            )
        (node,) = matches
        known = set(node.inputs)
        if node.kind in CLASSES:
            known = {socket.id for socket in node.schema.inputs}
        if name not in known:
            listed = ", ".join(map(plain, sorted(known)))
            raise ValueError(f"--set {setting!r}: {node.name} has no input {name!r}, only {listed}")
        nodes[node.id] = replace(node, inputs={**node.inputs, name: text})
    return nodes


def outputs_of(nodes: dict[str, Node]) -> list[Node]:
    """Return the nodes that save or show; ValueError if none does, or if some need ComfyUI."""
    runnable = CLASSES.keys() - NEEDS_COMFYUI
    foreign = [node for node in nodes.values() if node.kind not in runnable]
    if foreign:
        listed = ", ".join(f"{node.name} of class {plain(node.kind)}" for node in foreign[:5])
        raise ValueError(f"{listed}: this workflow needs ComfyUI, run it there")
    outputs = [node for node in nodes.values() if node.schema.is_output_node]
    if not outputs:
        raise ValueError("the workflow has no node that saves anything: add SaveVideo")
    return outputs


def order(nodes: dict[str, Node], outputs: Sequence[Node]) -> list[Node]:
    """Sort what the outputs need topologically; ValueError for a cycle or a dangling link."""
    done: dict[str, Node] = {}
    open_: list[tuple[Node, bool]] = [(node, False) for node in reversed(outputs)]
    path: set[str] = set()
    while open_:
        node, ready = open_.pop()
        if ready:
            path.discard(node.id)
            done.setdefault(node.id, node)
            continue
        if node.id in done:
            continue
        path.add(node.id)
        open_.append((node, True))
        for name, value in node.inputs.items():
            if not is_link(value):
                continue
            where = f"{node.name}, input {plain(name)}"
            if value[0] not in nodes:
                raise ValueError(
                    f"{where}: it is linked to node {plain(value[0])}, which is not there"
                )
            if value[0] in path:
                raise ValueError(f"{where}: the nodes go round in a circle through it")
            open_.append((nodes[value[0]], False))
    return list(done.values())


def checked(node: Node, nodes: dict[str, Node]) -> dict[str, Any]:
    """Check and convert a node's constants; links stay as they are. Raises ValueError."""
    inputs = {}
    for socket in node.schema.inputs:
        if socket.id not in node.inputs:
            if not socket.optional:
                raise ValueError(
                    f"{node.name}, input {socket.id}: it is missing, connect or set it"
                )
            continue
        value = node.inputs[socket.id]
        try:
            if is_link(value):
                inputs[socket.id] = _linked(value, socket, nodes)
            else:
                inputs[socket.id] = _constant(value, socket)
        except ValueError as error:
            raise ValueError(f"{node.name}, input {socket.id}: {error}") from None
    _validate(node, {name: value for name, value in inputs.items() if not is_link(value)})
    return inputs


def _validate(node: Node, constants: dict[str, Any]) -> None:
    """Let a node class check the constants that it asks for by name."""
    validate = getattr(CLASSES[node.kind], "validate_inputs", None)
    if validate is None:
        return
    names = inspect.signature(validate).parameters
    result = validate(**{name: value for name, value in constants.items() if name in names})
    if result is not True:
        raise ValueError(f"{node.name}: {result}")


def _linked(value: list, socket: Socket, nodes: dict[str, Node]) -> list:
    source = nodes[value[0]]
    outputs = source.schema.outputs
    if not 0 <= value[1] < len(outputs):
        raise ValueError(f"{source.name} has {len(outputs)} outputs and none of number {value[1]}")
    io_type = outputs[value[1]].io_type
    if io_type not in socket.io_type.split(","):
        raise ValueError(f"it takes {socket.io_type} and {source.name} gives {io_type}")
    return value


def _constant(value: Any, socket: Socket) -> Any:
    cast = CASTS.get(socket.io_type)
    if cast is None and socket.options is None:
        raise ValueError(f"it takes a link to {socket.io_type} and not {str(value)[:40]!r}")
    try:
        value = value if cast is None else _cast(cast, value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{str(value)[:40]!r} is not {socket.io_type}") from None
    if socket.min is not None and not value >= socket.min:
        raise ValueError(f"{value} is smaller than the least, {socket.min}")
    if socket.max is not None and not value <= socket.max:
        raise ValueError(f"{value} is bigger than the most, {socket.max}")
    if socket.options is not None and value not in socket.options:
        near = difflib.get_close_matches(str(value), socket.options, n=3, cutoff=0.3)
        nearest = ", ".join(map(repr, near or socket.options[:3])) or "nothing yet"
        raise ValueError(
            f"{str(value)[:80]!r} is not one of the {len(socket.options)} there are, the nearest:"
            f" {nearest}"
        )
    return value


def _cast(cast: Callable[[Any], Any], value: Any) -> Any:
    if cast is not bool or not isinstance(value, str):
        return cast(value)
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{value!r} is no boolean")
    return value.lower() == "true"


def all_checked(needed: Sequence[Node], nodes: dict[str, Node]) -> dict[str, dict[str, Any]]:
    """Inputs of nodes by id; one ValueError names all nodes that have a wrong one."""
    inputs, wrong = {}, []
    for node in needed:
        try:
            inputs[node.id] = checked(node, nodes)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong[:MOST_WRONG]))
    return inputs


def execute(nodes: dict[str, Node]) -> dict[str, NodeOutput]:
    """Run what the outputs of a workflow need; the result of each node, by id.

    Checks everything before it runs anything. Raises ValueError that names the node.
    """
    needed = order(nodes, outputs_of(nodes))
    inputs = all_checked(needed, nodes)
    results: dict[str, NodeOutput] = {}
    for node in needed:
        values = {
            name: results[value[0]].args[value[1]] if is_link(value) else value
            for name, value in inputs[node.id].items()
        }
        if node.schema.is_input_list:
            values = {name: [value] for name, value in values.items()}
        try:
            results[node.id] = CLASSES[node.kind].execute(**values)
        except ValueError as error:
            raise ValueError(f"{node.name}: {error}") from error
    return results


def written(results: dict[str, NodeOutput]) -> list[Path]:
    """List the files that the nodes wrote."""
    shown = []
    for output in results.values():
        shown += output.ui if isinstance(output.ui, list) else [output.ui]
    return [path for path in shown if isinstance(path, Path)]
