"""The pack's workflows, cut down to what random weights sample in a second."""

import json
from pathlib import Path

import autorefiner

WORKFLOWS = Path(autorefiner.__file__).parent / "workflows"
API = WORKFLOWS / "api"
NAMES = sorted(path.stem for path in API.glob("*.json"))
NEED_COMFYUI = {"sampler_custom_advanced"}
SMALL = {"AutoRefinerSampler": {"width": 64, "height": 64}, "ImageScale": {"width": 64, "height": 64}}


def small(name: str) -> dict:
    """A workflow at 64x64, with the demo's text encoder where it has umT5."""
    graph = json.loads((API / f"{name}.json").read_text())
    for node in graph.values():
        node["inputs"] |= SMALL.get(node["class_type"], {})
        if node["class_type"] == "CLIPLoader":
            node |= {"class_type": "AutoRefinerLoadDemo", "inputs": {}}
    for node in graph.values():
        source = graph.get(str((node["inputs"].get("clip") or [""])[0]), {})
        if source.get("class_type") == "AutoRefinerLoadDemo":
            node["inputs"]["clip"][1] = 1
    return graph


def node(kind: str, **inputs: object) -> dict:
    """A node of a graph."""
    return {"class_type": kind, "inputs": inputs}


def of_kind(graph: dict, kind: str) -> str:
    """The id of the last node of a class."""
    return [key for key, found in graph.items() if found["class_type"] == kind][-1]
