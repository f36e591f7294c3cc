"""The page in a real browser: pytest -m page, with ComfyUI as for -m comfyui, a Chromium and playwright.

PAGE_PICTURES names a folder for screenshots.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_graphs import WORKFLOWS, of_kind, small
from comfy_page import to_page
from comfy_server import Server, find_comfyui
from page_browser import Page, find_chromium, opened

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium"),
]
FILES = sorted(WORKFLOWS.glob("*.json"))
STATUS = ".autorefiner-status"
FINISHED = ".autorefiner-finished"


def named(kind: str) -> set[str]:
    """Files that the workflows have in the loaders of a class."""
    graphs = (json.loads(path.read_text()) for path in FILES)
    return {node["widgets_values"][0] for graph in graphs for node in graph["nodes"] if node["type"] == kind}


@pytest.fixture(scope="module", params=["standard", "vue"])
def page(request, server: Server) -> Iterator[Page]:
    for folder, kind in (("text_encoders", "CLIPLoader"), ("loras", "AutoRefinerLoadRefiner")):
        for name in named(kind):  # the page looks whether a file is there, and none is read
            path = server.base / "models" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    with opened(server, request.param == "vue") as page:
        page.name = request.param
        yield page


def picture(page: Page, name: str) -> None:
    """A screenshot, where they are wanted."""
    if folder := os.environ.get("PAGE_PICTURES"):
        page.tab.screenshot(path=str(Path(folder) / f"{name}-{page.name}.png"))


def ended(page: Page, how: str) -> None:
    """Wait until the strip says how the run ended."""
    page.tab.wait_for_function(f"() => document.querySelector('{STATUS}')?.textContent.includes('{how}')")


def idle(server: Server, page: Page) -> None:
    """Wait until the queue is empty."""
    while any(server.get("/queue").values()):
        page.tab.wait_for_timeout(100)


@pytest.mark.parametrize("workflow", FILES, ids=lambda path: path.stem)
def test_workflows_open_without_a_complaint(workflow: Path, page: Page) -> None:
    page.errors.clear()
    page.load(workflow)
    page.fit()
    kinds = {node["type"] for node in json.loads(workflow.read_text())["nodes"]}
    known = set(page.tab.evaluate("() => Object.keys(LiteGraph.registered_node_types)"))
    assert kinds <= known
    assert not page.tab.evaluate("() => window.app.graph.nodes.some((node) => node.has_errors)")
    assert page.errors == []
    picture(page, workflow.stem)


def test_the_strip_fills_stays_and_comes_back(page: Page, server: Server) -> None:
    page.errors.clear()
    page.load(WORKFLOWS / "quickstart.json")
    page.look_at("AutoRefinerSampler")
    page.set("AutoRefinerSampler", length=117, width=128, height=128, seed=len(page.name))
    tab = page.tab
    seen = set()
    page.queue()
    tab.wait_for_selector(FINISHED)
    while "done" not in tab.inner_text(STATUS):
        seen.add(tab.locator(FINISHED).count())
    assert len(seen) > 2  # some while others were still to come
    assert tab.locator(FINISHED).count() == 10
    assert tab.evaluate("() => document.querySelector('.autorefiner-picture').style.backgroundImage").startswith("url")
    assert "chunk 10/10" in tab.inner_text(STATUS) and "frames/s" in tab.inner_text(STATUS)
    picture(page, "strip")
    idle(server, page)

    saved = tab.evaluate("() => window.app.graph.serialize()")
    sampler = next(node for node in saved["nodes"] if node["type"] == "AutoRefinerSampler")
    assert len(json.dumps(sampler["properties"])) < 110_000
    given = json.loads((WORKFLOWS / "quickstart.json").read_text())
    before = next(node for node in given["nodes"] if node["type"] == "AutoRefinerSampler")
    assert len(sampler["widgets_values"]) == len(before["widgets_values"])
    path = server.base / "kept.json"
    path.write_text(json.dumps(saved))
    page.load(path)
    page.look_at("AutoRefinerSampler")
    assert tab.locator(FINISHED).count() == 10 and "done" in tab.inner_text(STATUS)
    tab.click(".autorefiner-tile >> nth=2")
    assert "chunk 3" in tab.inner_text(".autorefiner-dialog")
    tab.keyboard.press("ArrowRight")
    assert "chunk 4" in tab.inner_text(".autorefiner-dialog")
    picture(page, "enlarged")
    tab.keyboard.press("Escape")
    assert page.errors == []


def test_the_button_ends_the_run_and_what_is_finished_is_saved(page: Page, server: Server) -> None:
    page.errors.clear()
    page.load(WORKFLOWS / "quickstart.json")
    page.look_at("AutoRefinerSampler")
    page.set("AutoRefinerSampler", length=4001, width=128, height=128, seed=len(page.name))  # longer than any click
    videos = len(list((server.base / "output" / "video").glob("*.mp4")))
    page.queue()
    page.tab.wait_for_selector(FINISHED)
    page.tab.click(".autorefiner-stop")
    picture(page, "running")
    ended(page, "stopped")
    idle(server, page)
    assert 0 < page.tab.locator(FINISHED).count() < 334
    assert len(list((server.base / "output" / "video").glob("*.mp4"))) == videos + 1
    assert page.errors == []


def test_the_strip_of_a_sampler_shows_on_the_node_that_made_it(page: Page, server: Server) -> None:
    page.errors.clear()
    page.load(WORKFLOWS / "sampler_custom_advanced.json")
    page.look_at("AutoRefinerCustomSampler")
    page.queue()
    ended(page, "done")
    idle(server, page)
    picture(page, "strip-custom")
    assert page.errors == []


def test_two_clips_play_in_step_under_a_slider(page: Page, server: Server) -> None:
    graph = json.loads((WORKFLOWS / "compare_controls.json").read_text())
    for node in graph["nodes"]:
        if node["type"] == "AutoRefinerSampler":
            node["widgets_values"][2] = 21
    path = server.base / "compared.json"
    path.write_text(json.dumps(graph))
    page.errors.clear()
    page.load(path)
    page.look_at("AutoRefinerCompareVideos")
    page.queue()
    tab, times = page.tab, "() => [...document.querySelectorAll('.autorefiner-video')].map((one) => one.currentTime)"
    tab.wait_for_function(f"() => ({times})().every((time) => time > 0.3)")
    apart = [abs(base - refined) for base, refined in (tab.evaluate(times) for _ in range(5))]
    assert sorted(apart)[2] < 2 / 16
    tab.locator(".autorefiner-compare input").fill("8")
    tab.wait_for_function(f"() => ({times})().every((time) => time === 8.5 / 16)")
    assert tab.inner_text(".autorefiner-compare .autorefiner-status") == "9/21"
    box = tab.locator(".autorefiner-screen").bounding_box()
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 40)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 40)
    tab.mouse.up()
    left = tab.evaluate("() => Number.parseFloat(document.querySelector('.autorefiner-line').style.left)")
    assert abs(left - 25) < 1
    idle(server, page)
    picture(page, "compare")
    assert page.errors == []


def test_a_training_shows_its_curves_and_sheets_and_comes_back(page: Page, server: Server, peft_inside: None) -> None:
    graph = small("train_a_refiner")
    trainer = of_kind(graph, "AutoRefinerTrainRefiner")
    graph[trainer]["inputs"] |= {"run": f"page {page.name}", "steps": 6}
    path = server.base / "training.json"
    path.write_text(json.dumps(to_page(graph, server.get("/object_info"))))
    page.errors.clear()
    page.load(path)
    page.look_at("AutoRefinerTrainRefiner")
    page.queue()
    tab, status = page.tab, ".autorefiner-trainer .autorefiner-status"
    tab.wait_for_function(f"() => document.querySelector('{status}').textContent.includes('done')")
    assert "step 6/6" in tab.inner_text(status)
    tab.wait_for_function("() => document.querySelector('.autorefiner-sheet').naturalWidth > 100")
    names = tab.locator(".autorefiner-curve text:first-of-type").all_text_contents()
    assert names[0] == "loss" and "gradient" in names
    points = tab.get_attribute(".autorefiner-curve polyline >> nth=0", "points")
    assert len(points.split()) == 6
    picture(page, "trainer")
    tab.click(".autorefiner-sheet")
    assert tab.locator(".autorefiner-sheet-large").is_visible()
    tab.keyboard.press("Escape")
    idle(server, page)
    saved = tab.evaluate("() => window.app.graph.serialize()")
    path.write_text(json.dumps(saved))
    page.load(path)
    page.look_at("AutoRefinerTrainRefiner")
    assert "step 6/6" in tab.inner_text(status) and "done" in tab.inner_text(status)
    assert tab.get_attribute(".autorefiner-curve polyline >> nth=0", "points") == points
    assert page.errors == []


def test_the_cache_draws_what_a_chunk_sees_as_its_widgets_say(page: Page) -> None:
    def drawn() -> dict[str, int]:
        kinds = ("sink", "gone", "recent", "now", "previous")
        return {kind: page.tab.locator(f".autorefiner-drawing .autorefiner-{kind}").count() for kind in kinds}

    def says(part: str) -> None:
        page.tab.wait_for_function(f"() => document.querySelector('.autorefiner-memory').innerText.includes('{part}')")

    page.errors.clear()
    page.load(WORKFLOWS / "self_forcing_refiner.json")
    page.look_at("AutoRefinerReflectiveCache")
    page.set("AutoRefinerReflectiveCache", window=12, sink=3)
    says("9/18")
    assert drawn() == {"sink": 3, "gone": 9, "recent": 6, "now": 3, "previous": 3}
    picture(page, "cache")
    page.set("AutoRefinerReflectiveCache", window=-1, sink=0, previous_x0="none")
    says("18/18")
    assert drawn() == {"sink": 0, "gone": 0, "recent": 18, "now": 3, "previous": 0}
    page.set("AutoRefinerReflectiveCache", window=2)
    says("window of at least")
    assert [told for told in page.errors if "autorefiner/cache" not in told] == []


def test_a_workflow_from_anywhere_cannot_put_markup_into_the_page(page: Page, server: Server) -> None:
    page.errors.clear()
    graph = json.loads((WORKFLOWS / "quickstart.json").read_text())
    sampler = next(node for node in graph["nodes"] if node["type"] == "AutoRefinerSampler")
    evil = "<img src=x onerror='window.owned = 1'>"
    chunk = {"chunk": 0, "level": 4, "levels": 4, "start": evil, "end": 9, "image": f'/9j/"){evil}', "pictures": 1}
    odd = [None, 7, {"chunk": -1}, {"chunk": 1e9}, chunk]
    sampler["properties"]["autorefiner_chunks"] = {"total": 7, "chunks": odd, "ended": evil, "elapsed": evil}
    away = {"filename": "sheet_1.png", "subfolder": "autorefiner/../.."}
    curves = {evil: [[0, 1], [1, 2]], "loss": [["x", evil]], "long": [[0, 1]] * 5000}
    kept = {"step": evil, "steps": 9, "ended": evil, "curves": curves, "sheet": away}
    trainer = to_page(small("train_a_refiner"), server.get("/object_info"))["nodes"]
    trainer = next(node for node in trainer if node["type"] == "AutoRefinerTrainRefiner")
    for socket in trainer["inputs"]:
        socket["link"] = None
    trainer |= {"id": 99, "properties": {"autorefiner_training": kept}, "outputs": []}
    graph["nodes"].append(trainer)
    path = server.base / "evil.json"
    path.write_text(json.dumps(graph))
    page.load(path)
    assert page.tab.locator(".autorefiner-curve text:first-of-type").all_text_contents() == [evil[:40]]
    assert page.tab.get_attribute(".autorefiner-sheet", "src") == ""
    page.look_at("AutoRefinerSampler")
    assert page.tab.locator(FINISHED).count() == 1
    assert page.tab.evaluate("() => window.owned === undefined && !document.querySelector('img[src=x]')")
    assert page.errors == []
