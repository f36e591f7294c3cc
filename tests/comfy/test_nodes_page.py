"""How single nodes look in a real browser, in both renderers: `pytest -m page`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_server import Server, find_comfyui
from page_browser import NODES, Page, find_chromium, opened
from page_runs import picture
from safetensors.torch import load_file
from standalone_runs import execute

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium"),
]
FORMER = Path(__file__).with_name("former_search.json")  # saved before there was Search by Reward

SHOWN_TEXT = """(word) => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const shown = walker.currentNode;
        const inert = ["SCRIPT", "STYLE"].includes(shown.parentElement.tagName);
        if (!inert && shown.data.includes(word)) return shown;
    }
}"""  # the element's text in which a word is shown

HEIGHT = "() => document.querySelector('.autorefiner-screen').getBoundingClientRect().height"


@pytest.fixture(scope="module", params=["standard", "vue"])
def page(request, server: Server) -> Iterator[Page]:
    with opened(server, request.param == "vue") as page:
        page.name = request.param
        yield page


def add(page: Page, kind: str) -> None:
    """Put a new node of a class alone on the page, as a user does."""
    page.tab.evaluate(
        """(kind) => {
            window.app.graph.clear();
            const node = LiteGraph.createNode(kind);
            node.pos = [100, 100];
            window.app.graph.add(node);
        }""",
        kind,
    )
    page.until(f"!LiteGraph.vueNodesMode || document.querySelectorAll('{NODES}').length === 1")
    page.look_at(kind)


def widgets_in_sight(page: Page, kind: str) -> set[str]:
    """Return the names of a node's widgets that a user sees."""
    return set(
        page.tab.evaluate(
            """(kind) => {
                const node = window.app.graph.nodes.find((node) => node.comfyClass === kind);
                if (!LiteGraph.vueNodesMode) {
                    const seen = node.widgets.filter((widget) => node.isWidgetVisible(widget));
                    return seen.map(({ name }) => name);
                }
                const label = "[data-testid=widget-layout-field-label]";
                const rows = document.querySelectorAll(`[data-node-id="${node.id}"] ${label}`);
                return [...rows].map((row) => row.textContent.trim());
            }""",
            kind,
        )
    )


def sockets(page: Page, kind: str) -> list[str]:
    """Return the names of a node's input sockets that are no widget's."""
    return page.tab.evaluate(
        """(kind) => {
            const node = window.app.graph.nodes.find((node) => node.comfyClass === kind);
            return node.inputs.filter(({ widget }) => !widget).map(({ name }) => name);
        }""",
        kind,
    )


@pytest.mark.parametrize("kind", ["AutoRefinerSampler", "AutoRefinerCustomSampler"])
def test_a_new_sampler_shows_no_input_of_older_workflows(page: Page, kind: str) -> None:
    page.errors.clear()
    add(page, kind)
    assert {"search", "vae"} <= set(sockets(page, kind))
    assert "reward" not in sockets(page, kind)
    page.settle()
    picture(page, f"new-{kind}")
    seen = widgets_in_sight(page, kind)
    assert "method" in seen and not seen & {"prompt", "candidates"}
    assert page.errors == []


def test_a_search_of_an_older_workflow_gives_the_same(
    page: Page, server: Server, stand_ins: None
) -> None:
    page.errors.clear()
    page.load(FORMER)
    page.look_at("AutoRefinerSampler")
    page.settle()
    picture(page, "former-search")
    assert {"prompt", "method"} <= widgets_in_sight(page, "AutoRefinerSampler")
    graph = page.tab.evaluate("async () => (await window.app.graphToPrompt()).output")
    expected = {"method": "best-of-n", "prompt": "a red star", "candidates": 2, "seed": 7}
    expected |= {"reward": ["4", 0], "vae": ["1", 2], "noise": "white", "length": 13}
    assert {name: graph["3"]["inputs"].get(name) for name in expected} == expected
    server.run(graph)
    saved = sorted((server.base / "output").glob("former_search*.latent"))[-1]
    graph["5"] = {
        "class_type": "AutoRefinerDecodeToVideo",
        "inputs": {"samples": ["3", 0], "vae": ["1", 2], "fps": 16, "filename_prefix": "former"},
    }
    alone = execute(graph, server.base)["3"][0]["samples"]
    assert torch.allclose(load_file(saved)["latent_tensor"], alone, atol=1e-4)
    again = server.base / "former_again.json"
    again.write_text(json.dumps(page.tab.evaluate("() => window.app.graph.serialize()")))
    page.load(again)
    assert graph["3"] == page.tab.evaluate(
        "async () => (await window.app.graphToPrompt()).output[3]"
    )
    assert page.errors == []


def test_a_sampler_of_an_older_workflow_without_a_search_looks_like_a_new_one(
    page: Page, tmp_path: Path
) -> None:
    workflow = json.loads(FORMER.read_text())
    sampler = next(node for node in workflow["nodes"] if node["type"] == "AutoRefinerSampler")
    sampler["widgets_values"][6] = "self-forcing"
    for socket in sampler["inputs"]:
        if socket["name"] in ("reward", "vae"):
            socket["link"] = None
    workflow["links"] = [link for link in workflow["links"] if link[0] not in (5, 6)]
    path = tmp_path / "former_plain.json"
    path.write_text(json.dumps(workflow))
    page.load(path)
    page.look_at("AutoRefinerSampler")
    page.settle()
    assert "reward" not in sockets(page, "AutoRefinerSampler")
    assert not widgets_in_sight(page, "AutoRefinerSampler") & {"prompt", "candidates"}
    graph = page.tab.evaluate("async () => (await window.app.graphToPrompt()).output")
    assert graph["3"]["inputs"]["noise"] == "white" and graph["3"]["inputs"]["seed"] == 7


def test_compare_videos_grows_with_its_node(page: Page) -> None:
    add(page, "AutoRefinerCompareVideos")
    scale = page.tab.evaluate("() => window.app.canvas.ds.scale")
    heights = []
    for height in (400, 800):
        page.tab.evaluate(
            """(height) => {
                const node = window.app.graph.nodes[0];
                node.setSize([node.size[0], height]);
                window.app.canvas.setDirty(true, true);
            }""",
            height,
        )
        heights.append(page.still(HEIGHT))
        picture(page, f"compare-{height}")
    assert heights[1] - heights[0] > 0.9 * 400 * scale


def test_text_on_a_node_breaks_between_words_only(page: Page) -> None:
    add(page, "AutoRefinerReflectiveCache")
    text = "a memory of several latent frames, of them the first are a sink; positions are relative"
    page.tab.evaluate(
        """(text) => {
            const [node] = window.app.graph.nodes;
            node.setSize([300, node.size[1]]);
            window.app.api.dispatchCustomEvent("progress_text", { nodeId: String(node.id), text });
        }""",
        text,
    )
    page.until(f"({SHOWN_TEXT})('several')")
    page.settle()
    picture(page, "text")
    lines = page.tab.evaluate(
        """() => {
            const text = FIND("several");
            const words = [...text.data.matchAll(/\\S+/g)].map(({ index, 0: word }) => {
                const range = document.createRange();
                range.setStart(text, index);
                range.setEnd(text, index + word.length);
                return range.getClientRects().length;
            });
            const whole = document.createRange();
            whole.selectNode(text);
            return [Math.max(...words), whole.getClientRects().length];
        }""".replace("FIND", f"({SHOWN_TEXT})")
    )
    assert lines[0] == 1 and lines[1] > 1
