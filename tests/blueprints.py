"""Blueprints of subgraphs for the page's node library: subgraphs/NAME.json."""

import json
import uuid
from pathlib import Path

from comfy_graphs import API, node
from comfy_page import inputs_of, to_page
from comfy_server import PACK
from published_urls import models_of

FOLDER = PACK / "subgraphs"
NAME = "Self-Forcing with a Refiner"
DESCRIPTION = (
    "Text to video by Self-Forcing, chunk by chunk, with a noise refiner. A strength of 0 is the"
    " model without the refiner."
)
CATEGORY = "Video generation and editing/Text to video"
# Inputs of the subgraph: inner node, widget, and its label.
SHOWN = (
    ("4", "text", "prompt"), ("7", "width", "width"), ("7", "height", "height"),
    ("7", "length", "length"), ("7", "seed", "seed"), ("5", "strength", "refiner strength"),
    ("5", "file", "refiner"),
)  # fmt: skip
INSIDE, OUTSIDE = -10, -20  # ids of the subgraph's input and output nodes
SLOT, MARGIN = 20, 220  # pixels


def graph() -> dict:
    """Return the nodes inside: the workflow self_forcing_refiner, decoded to images."""
    nodes = json.loads((API / "self_forcing_refiner.json").read_text(encoding="utf-8"))
    del nodes["6"], nodes["7"]["inputs"]["reflective_cache"]
    nodes["8"] = node("AutoRefinerDecodeChunks", samples=["7", 0], vae=["3", 0])
    nodes["8"]["_meta"] = {"title": "VAE Decode Chunks"}
    return nodes


def blueprint(info: dict) -> dict:
    """Return the blueprint: a workflow with one node, an instance of the subgraph."""
    page = to_page(graph(), info)
    nodes = {str(each["id"]): each for each in page["nodes"]}
    links = [
        {"id": number, "origin_id": source, "origin_slot": output, "target_id": target,
         "target_slot": slot, "type": kind}
        for number, source, output, target, slot, kind in page["links"]
    ]  # fmt: skip
    for each in page["nodes"]:
        each["inputs"] += widget_sockets(info[each["type"]])
    inputs = []
    for slot, (key, widget, label) in enumerate(SHOWN):
        sockets, number = nodes[key]["inputs"], len(links) + 1
        place = [socket["name"] for socket in sockets].index(widget)
        kind = sockets[place]["type"]
        sockets[place]["link"] = number
        links.append(
            {"id": number, "origin_id": INSIDE, "origin_slot": slot, "target_id": int(key),
             "target_slot": place, "type": kind}
        )  # fmt: skip
        inputs.append(
            {"id": identity(f"input {label}"), "name": widget, "label": label, "type": kind,
             "linkIds": [number]}
        )  # fmt: skip
    number = len(links) + 1
    links.append(
        {"id": number, "origin_id": 8, "origin_slot": 0, "target_id": OUTSIDE, "target_slot": 0,
         "type": "IMAGE"}
    )  # fmt: skip
    nodes["8"]["outputs"][0]["links"] = [number]
    for each in page["nodes"]:
        if models := models_of(each):
            each["properties"]["models"] = models
    right = max(each["pos"][0] + each["size"][0] for each in page["nodes"])
    subgraph = {
        "id": identity("subgraph"), "version": 1, "revision": 0, "config": {}, "name": NAME,
        "category": CATEGORY, "description": DESCRIPTION,
        "state": {"lastGroupId": 0, "lastNodeId": 8, "lastLinkId": number, "lastRerouteId": 0},
        "inputNode": {"id": INSIDE, "bounding": [-MARGIN, 60, 120, SLOT * (len(inputs) + 2)]},
        "outputNode": {"id": OUTSIDE, "bounding": [right + MARGIN / 2, 60, 120, 3 * SLOT]},
        "inputs": inputs,
        "outputs": [
            {"id": identity("output"), "name": "images", "type": "IMAGE", "linkIds": [number]}
        ],
        "widgets": [], "nodes": page["nodes"], "groups": [], "links": links, "extra": {},
    }  # fmt: skip
    return {
        "revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [instance(subgraph)],
        "links": [], "version": 0.4, "definitions": {"subgraphs": [subgraph]}, "extra": {},
    }  # fmt: skip


def instance(subgraph: dict) -> dict:
    """Return a node that is the subgraph."""
    return {
        "id": 1, "type": subgraph["id"], "pos": [0, 0], "size": [400, 380], "flags": {},
        "order": 0, "mode": 0, "title": NAME, "widgets_values": [],
        "properties": {"proxyWidgets": [[key, widget] for key, widget, _ in SHOWN]},
        "inputs": [
            {"name": each["name"], "label": each["label"], "type": each["type"],
             "widget": {"name": each["name"]}, "link": None}
            for each in subgraph["inputs"]
        ],
        "outputs": [{"name": "images", "type": "IMAGE", "links": []}],
    }  # fmt: skip


def identity(text: str) -> str:
    """Return a UUID that stays the same."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"autorefiner/{NAME}/{text}"))


def widget_sockets(definition: dict) -> list[dict]:
    """Return the sockets that the page gives the widgets of a node, after the others."""
    return [
        {"name": name, "type": kind, "widget": {"name": name}, "link": None}
        for name, kind, _, widget in inputs_of(definition)
        if widget
    ]


def write(info: dict, folder: Path = FOLDER) -> Path:
    """Write the blueprint's file."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{NAME}.json"
    path.write_text(json.dumps(blueprint(info), indent=1) + "\n", encoding="utf-8")
    return path
