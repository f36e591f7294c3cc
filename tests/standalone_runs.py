"""Workflows that tests run without ComfyUI: what each node gave, or the one line that refuses."""

import json
from pathlib import Path

import pytest

from autorefiner.nodes import workflow
from autorefiner.nodes.hosts import standalone


def run_workflow(graph: dict, base: Path) -> dict[str, workflow.NodeOutput]:
    """Of a graph in API format, at the folder `base`."""
    path = base / "graph.json"
    path.write_text(json.dumps(graph))
    with standalone.running_at(standalone.place_of(base, None, "cpu")):
        return workflow.execute(workflow.read_workflow(path))


def execute(graph: dict, base: Path) -> dict[str, tuple]:
    """What each node gave."""
    return {key: output.args for key, output in run_workflow(graph, base).items()}


def refusal(graph: dict, base: Path) -> str:
    """The message, in one line, of a graph that cannot run."""
    with pytest.raises(ValueError) as error:
        run_workflow(graph, base)
    assert "\n" not in str(error.value)
    return str(error.value)
