"""Run workflows without ComfyUI: the outputs of each node, or the one-line refusal."""

import json
from pathlib import Path

import pytest

from autorefiner.nodes import workflow
from autorefiner.nodes.hosts import standalone


def run_workflow(graph: dict, base: Path) -> dict[str, workflow.NodeOutput]:
    """Run a graph in API format at the folder `base`; return each node's output."""
    path = base / "graph.json"
    path.write_text(json.dumps(graph))
    with standalone.running_at(standalone.place_of(base, None, "cpu")):
        return workflow.execute(workflow.read_workflow(path))


def execute(graph: dict, base: Path) -> dict[str, tuple]:
    """Run a graph; return each node's output values."""
    return {key: output.args for key, output in run_workflow(graph, base).items()}


def refusal(graph: dict, base: Path) -> str:
    """Run a graph that must be refused; return the one-line message."""
    with pytest.raises(ValueError) as error:
        run_workflow(graph, base)
    assert "\n" not in str(error.value)
    return str(error.value)
