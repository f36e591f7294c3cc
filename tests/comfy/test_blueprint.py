"""The blueprint of subgraphs/: its file, and a node made from it in the page, which runs."""

import json
from collections.abc import Iterator

import pytest
from blueprints import FOLDER, INSIDE, NAME, SHOWN
from comfy_graphs import node, of_kind
from comfy_server import Server, find_comfyui
from page_browser import Page, find_chromium, opened

PATH = FOLDER / f"{NAME}.json"


def test_each_input_of_the_blueprint_is_a_widget_inside() -> None:
    blueprint = json.loads(PATH.read_text(encoding="utf-8"))
    (subgraph,) = blueprint["definitions"]["subgraphs"]
    (instance,) = blueprint["nodes"]
    assert instance["type"] == subgraph["id"]
    nodes = {each["id"]: each for each in subgraph["nodes"]}
    for link in subgraph["links"]:
        if link["target_id"] in nodes:
            socket = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert (socket["link"], socket["type"]) == (link["id"], link["type"])
        if link["origin_id"] == INSIDE:
            shown = subgraph["inputs"][link["origin_slot"]]
            assert shown["linkIds"] == [link["id"]]
            assert socket["widget"]["name"] == shown["name"]
    labels = [each["label"] for each in instance["inputs"]]
    assert labels == [label for _, _, label in SHOWN]
    assert {"prompt", "width", "height", "length", "seed", "refiner strength"} <= set(labels)


@pytest.fixture(scope="module", params=["standard", "vue"])
def page(request, server: Server) -> Iterator[Page]:
    with opened(server, request.param == "vue") as page:
        yield page


@pytest.mark.page
@pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium")
def test_a_node_of_the_library_runs(page: Page, server: Server) -> None:
    page.tab.evaluate("() => window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.until("!window.app.graph.nodes.length")
    page.settle()
    page.errors.clear()
    # by its command: clicks of a busy machine are too far apart for a double click
    page.tab.evaluate(
        "() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')"
    )
    search = page.tab.get_by_role("search")
    search.get_by_role("combobox").fill(NAME)
    search.get_by_role("option").filter(has_text=NAME).first.click()
    page.until(f"window.app.graph.nodes.some((node) => node.title === '{NAME}')")
    page.settle()
    graph = page.tab.evaluate(
        """async (values) => {
            const [node] = window.app.graph.nodes;
            for (const [name, value] of Object.entries(values)) {
                node.widgets.find((widget) => widget.name === name).value = value;
            }
            return (await window.app.graphToPrompt()).output;
        }""",
        {"text": "a red star", "width": 64, "height": 64, "length": 9, "seed": 5, "strength": 0.5},
    )
    loader, prompt = of_kind(graph, "CLIPLoader"), of_kind(graph, "CLIPTextEncode")
    assert graph[prompt]["inputs"] == {"text": "a red star", "clip": [loader, 0]}
    sampler = graph[of_kind(graph, "AutoRefinerSampler")]["inputs"]
    assert [sampler[name] for name in ("width", "height", "length", "seed")] == [64, 64, 9, 5]
    assert graph[of_kind(graph, "AutoRefinerLoadRefiner")]["inputs"]["strength"] == 0.5
    graph[loader] = node("AutoRefinerLoadDemo")  # umT5 is too large to have here
    graph[prompt]["inputs"]["clip"][1] = 1
    graph["99"] = node("PreviewImage", images=[of_kind(graph, "AutoRefinerDecodeChunks"), 0])
    assert len(server.run(graph)["outputs"]["99"]["images"]) == 9
    assert page.errors == []
