"""The pack's workflows, reduced to what random weights sample in a second."""

import json
from pathlib import Path

import autorefiner

WORKFLOWS = Path(autorefiner.__file__).parent / "workflows"
API = WORKFLOWS / "api"
NAMES = sorted(path.stem for path in API.glob("*.json"))
NEED_COMFYUI = {"sampler_custom_advanced"}
NEED_PEFT = {"train_a_refiner"}
SIZE = {"width": 64, "height": 64}
SHORT_TRAINING = {"steps": 2, "batch_size": 1, "length": 9, "rank": 2, "preview_every": 2}
SHORT = {  # frames of clips that need no more to show what they do
    "best_of_n": 21, "krea_14b": 21, "long_video": 45, "longlive": 21, "reroll_a_chunk": 33,
    "video_to_video": 21,
}  # fmt: skip
SMALL = {
    "AutoRefinerSampler": SIZE,
    "AutoRefinerSearch": {"candidates": 2},
    "ImageScale": SIZE,
    "AutoRefinerTrainRefiner": {**SIZE, **SHORT_TRAINING},
}


def small(name: str) -> dict:
    """Return a workflow at 64x64 and short, with the demo's text encoder in place of umT5."""
    graph = json.loads((API / f"{name}.json").read_text())
    for node in graph.values():
        node["inputs"] |= SMALL.get(node["class_type"], {})
        if name in SHORT and "length" in node["inputs"]:
            node["inputs"]["length"] = SHORT[name]
        if node["class_type"] == "CLIPLoader":
            node |= {"class_type": "AutoRefinerLoadDemo", "inputs": {}}
    for node in graph.values():
        source = graph.get(str((node["inputs"].get("clip") or [""])[0]), {})
        if source.get("class_type") == "AutoRefinerLoadDemo":
            node["inputs"]["clip"][1] = 1
    return graph


def node(kind: str, /, **inputs: object) -> dict:
    """Return a node of a graph in API format."""
    return {"class_type": kind, "inputs": inputs}


def training(**inputs: object) -> dict:
    """Return a one-second training of the demo's student, saved as mine.refiner.safetensors."""
    widgets = {
        "run": "mine", "objective": "dmd", "prompts": "a red star\na blue square that spins",
        "steps": 4, "batch_size": 2, "width": 32, "height": 32, "length": 21, "rank": 2,
        "learning_rate": 1e-3, "seed": 0, "preview_every": 2, "method": "autorefiner", "levels": "",
        "accumulation": 1, "l2": 1.0, "critic_ratio": 2, "precision": "fp32",
        "checkpointing": False, "save_every": 100,
    }  # fmt: skip
    sockets = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "teacher": ["2", 0]}
    given = {
        name: value for name, value in {**sockets, **widgets, **inputs}.items() if value is not None
    }
    return {
        "1": node("AutoRefinerLoadDemo"),
        "2": node("AutoRefinerLoadDemo", network="teacher"),
        "3": node("AutoRefinerTrainRefiner", **given),
        "4": node("AutoRefinerSaveRefiner", refiner=["3", 0], name="mine", overwrite=True),
    }


def of_kind(graph: dict, kind: str) -> str:
    """Return the id of the last node of a class."""
    return [key for key, found in graph.items() if found["class_type"] == kind][-1]
