"""The workflow files of the page: nodes, groups and links as drawn, notes, published files."""

import json
from itertools import combinations

import pytest
from comfy_graphs import API, NAMES, WORKFLOWS
from comfy_page import NOTE
from comfy_server import PACK
from graph_drawing import drawing_of, overlap
from PIL import Image
from thumbnails import SIZE as THUMBNAIL
from workflow_layouts import COLOURS, CROSSINGS, LAYOUTS

MOST = (2450, 1290)  # larger drawings are too small to read when they fit on a page


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def page(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def test_every_workflow_has_a_layout_and_a_page() -> None:
    assert set(NAMES) == set(LAYOUTS) == {path.stem for path in WORKFLOWS.glob("*.json")}


def test_nodes_and_links_lie_clear_of_each_other(name: str, page: dict) -> None:
    drawing = drawing_of(page)
    assert drawing.overlaps() == []
    assert drawing.hidden() == []
    assert len(drawing.crossings()) <= CROSSINGS.get(name, 0)
    for axis, most in enumerate(MOST):
        first = min(box[axis] for box in drawing.boxes.values())
        assert max(box[axis + 2] for box in drawing.boxes.values()) - first <= most


def test_every_node_but_the_note_is_in_a_group(page: dict) -> None:
    drawing = drawing_of(page)
    (note,) = (node["id"] for node in page["nodes"] if node["type"] == NOTE)
    assert drawing.outside() == [note]
    assert not [pair for pair in combinations(drawing.groups, 2) if overlap(*pair)]
    colours = {group["title"]: group["color"] for group in page["groups"]}
    assert colours == {name.capitalize(): colour for name, colour in COLOURS.items()}


def test_the_note_has_three_sentences_and_a_link_to_help(name: str, page: dict) -> None:
    (text,) = (node["widgets_values"][0] for node in page["nodes"] if node["type"] == NOTE)
    sentences, link = text.split("\n\n")
    assert sentences == LAYOUTS[name].note
    assert len(sentences.replace(".refiner.", " ").replace(".pt", " ").split(". ")) == 3
    assert f"/blob/main/{LAYOUTS[name].help})" in link
    assert (PACK / LAYOUTS[name].help).is_file()


def test_the_page_has_the_nodes_and_links_of_the_api_file(name: str, page: dict) -> None:
    graph = json.loads((API / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {str(node["id"]): node for node in page["nodes"] if node["type"] != NOTE}
    assert {key: node["type"] for key, node in nodes.items()} == {
        key: node["class_type"] for key, node in graph.items()
    }
    linked = {
        (str(target), nodes[str(target)]["inputs"][slot]["name"]): [str(source), output]
        for _, source, output, target, slot, _ in page["links"]
    }
    assert linked == {
        (key, name): value
        for key, node in graph.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }


def test_loaders_of_published_files_say_where_to_get_them(page: dict) -> None:
    for node in page["nodes"]:
        if node["type"] not in ("AutoRefinerLoadARVDM", "CLIPLoader", "VAELoader"):
            continue
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0]
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(f"/{model['name']}")
        assert (PACK / model["directory"]).exists() is False and model["directory"]


def test_every_workflow_has_a_small_picture(name: str) -> None:
    path = WORKFLOWS / f"{name}.jpg"
    assert path.stat().st_size <= 40_000
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("JPEG", THUMBNAIL)
