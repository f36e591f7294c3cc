"""Execute a workflow in ComfyUI's API format without ComfyUI: check every node, then run what the outputs need."""

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

CLASSES: dict[str, type[ComfyNode]] = {node.define_schema().node_id: node for node in (*CORE_NODES, *NODES)}
NEEDS_COMFYUI = {"AutoRefinerCustomSampler"}
LARGEST = 4 << 20  # bytes of a workflow file
LONGEST_SHOWN = 80  # characters of a name of its
MOST_WRONG = 6  # nodes that one error names
CASTS: dict[str, Callable[[Any], Any]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


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
    """What a workflow calls something, as one line of a terminal can show it."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:LONGEST_SHOWN])


def is_link(value: object) -> bool:
    """Whether an input's value is another node's output, [id, index]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def read_workflow(path: Path) -> dict[str, Node]:
    """The nodes of a file by id; ValueError when it is no workflow in API format."""
    workflow = read_json(path, LARGEST)
    if isinstance(workflow, dict) and "nodes" in workflow and "links" in workflow:
        raise ValueError(f"{path} is a workflow of the page: give the one in workflows/api/, or save with Export (API)")
    if not isinstance(workflow, dict) or not workflow or not all(_is_node(node) for node in workflow.values()):
        raise ValueError(f"{path} is not a workflow in API format: give one saved with Export (API)")
    return {key: _node(key, node) for key, node in workflow.items()}


def _is_node(node: object) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _node(key: str, node: dict) -> Node:
    kind = node["class_type"]
    meta = node.get("_meta") if isinstance(node.get("_meta"), dict) else {}
    return Node(key, kind, str(meta.get("title") or kind), dict(node["inputs"]))


def prompt_of(nodes: dict[str, Node]) -> str:
    """The nodes as JSON in API format, for the files that they write."""
    prompt = {
        node.id: {"class_type": node.kind, "inputs": node.inputs, "_meta": {"title": node.title}}
        for node in nodes.values()
    }
    return json.dumps(prompt)


def with_values(nodes: dict[str, Node], settings: Sequence[str]) -> dict[str, Node]:
    """The nodes with `node.input=value` set, nodes by id, title or class; ValueError names what there is."""
    nodes = dict(nodes)
    for setting in settings:
        place, equals, text = setting.partition("=")
        where, dot, name = place.rpartition(".")
        if not equals or not dot:
            raise ValueError(f"--set {setting!r}: give node.input=value, like 5.seed=7 or 'Load AR-VDM.preset=causvid'")
        found = [node for node in nodes.values() if where in (node.id, node.title, node.kind)]
        if len(found) != 1:
            listed = ", ".join(f"{plain(node.id)} ({plain(node.title)})" for node in nodes.values())
            raise ValueError(f"--set {setting!r}: {len(found)} nodes are {where!r}; the nodes are {listed}")
        node = found[0]
        known = {socket.id for socket in node.schema.inputs} if node.kind in CLASSES else set(node.inputs)
        if name not in known:
            listed = ", ".join(map(plain, sorted(known)))
            raise ValueError(f"--set {setting!r}: {node.name} has no input {name!r}, only {listed}")
        nodes[node.id] = replace(node, inputs={**node.inputs, name: text})
    return nodes


def outputs_of(nodes: dict[str, Node]) -> list[Node]:
    """The nodes that save or show; ValueError for nodes that are not here, or none that saves."""
    foreign = [node for node in nodes.values() if node.kind not in CLASSES or node.kind in NEEDS_COMFYUI]
    if foreign:
        listed = ", ".join(f"{node.name} of class {plain(node.kind)}" for node in foreign[:5])
        raise ValueError(f"{listed}: this workflow needs ComfyUI, run it there")
    outputs = [node for node in nodes.values() if node.schema.is_output_node]
    if not outputs:
        raise ValueError("the workflow has no node that saves anything: add SaveVideo")
    return outputs


def order(nodes: dict[str, Node], outputs: Sequence[Node]) -> list[Node]:
    """What the outputs need, each node behind those that it needs; ValueError for a cycle or a lost link."""
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
                raise ValueError(f"{where}: it is linked to node {plain(value[0])}, which is not there")
            if value[0] in path:
                raise ValueError(f"{where}: the nodes go round in a circle through it")
            open_.append((nodes[value[0]], False))
    return list(done.values())


def checked(node: Node, nodes: dict[str, Node]) -> dict[str, Any]:
    """The inputs that a node will be called with: constants of their type, links as they are; else ValueError."""
    found = {}
    for socket in node.schema.inputs:
        if socket.id not in node.inputs:
            if not socket.optional:
                raise ValueError(f"{node.name}, input {socket.id}: it is missing, connect or set it")
            continue
        value = node.inputs[socket.id]
        try:
            found[socket.id] = _linked(value, socket, nodes) if is_link(value) else _constant(value, socket)
        except ValueError as error:
            raise ValueError(f"{node.name}, input {socket.id}: {error}") from None
    validate = getattr(CLASSES[node.kind], "validate_inputs", None)
    if validate is not None:
        names = inspect.signature(validate).parameters
        told = validate(**{name: value for name, value in found.items() if name in names and not is_link(value)})
        if told is not True:
            raise ValueError(f"{node.name}: {told}")
    return found


def _linked(value: list, socket: Socket, nodes: dict[str, Node]) -> list:
    source = nodes[value[0]]
    given = source.schema.outputs
    if not 0 <= value[1] < len(given):
        raise ValueError(f"{source.name} has {len(given)} outputs and none of number {value[1]}")
    if given[value[1]].io_type not in socket.io_type.split(","):
        raise ValueError(f"it takes {socket.io_type} and {source.name} gives {given[value[1]].io_type}")
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
        near = difflib.get_close_matches(str(value), socket.options, n=3, cutoff=0.3) or socket.options[:3]
        nearest = ", ".join(map(repr, near)) or "nothing yet"
        raise ValueError(
            f"{str(value)[:80]!r} is not one of the {len(socket.options)} there are, the nearest: {nearest}"
        )
    return value


def _cast(cast: Callable[[Any], Any], value: Any) -> Any:
    if cast is bool and isinstance(value, str):
        return {"true": True, "false": False}[value.lower()] if value.lower() in ("true", "false") else int("no")
    return cast(value)


def all_checked(needed: Sequence[Node], nodes: dict[str, Node]) -> dict[str, dict[str, Any]]:
    """Inputs of nodes by id; ValueError, one for all of them, names every node that has a wrong one."""
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
    """Run what the outputs of a workflow need, at the place that is set; what each node gave, by id.

    Everything is checked before anything runs. Raises ValueError that names the node.
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
    """The files that the nodes wrote."""
    shown = [output.ui if isinstance(output.ui, list) else [output.ui] for output in results.values()]
    return [path for paths in shown for path in paths if isinstance(path, Path)]
