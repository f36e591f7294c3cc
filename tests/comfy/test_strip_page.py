"""Runs on the page of a real ComfyUI: seen, reloaded, stopped and steered."""

import json
from collections.abc import Iterator

import pytest
import torch
from comfy_graphs import WORKFLOWS, of_kind, small
from comfy_graphs import node as graph_node
from comfy_runs import NEAR, alone
from comfy_server import Server, find_comfyui
from page_browser import FINISHED, STATUS, Page, another, find_chromium, opened, set_setting
from page_runs import ended, finished, idle, of_class, picture, sampled, written
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium"),
]
SAMPLER = "AutoRefinerSampler"
CHUNKS = 7  # of 81 frames
LONG = 4001  # frames: longer than a test takes
MARKS = """() => {
    const { isModified, changeTracker } = window.app.extensionManager.workflow.activeWorkflow;
    return [isModified, changeTracker.undoQueue.length];
}"""
WIDGETS = """(kind) => {
    const node = window.app.graph.nodes.find((node) => node.comfyClass === kind);
    return Object.fromEntries(node.widgets.map(({ name, value }) => [name, value]));
}"""
STRIP = """(kind) => {
    const node = window.app.graph.nodes.find((node) => node.comfyClass === kind);
    return node.widgets.find(({ name }) => name === "chunks").element;
}"""
SIZE = "(kind) => [...window.app.graph.nodes.find((node) => node.comfyClass === kind).size]"


@pytest.fixture(scope="module", params=["standard", "vue"])
def page(request, server: Server) -> Iterator[Page]:
    def persist(_: object) -> None:
        set_setting(server, "Comfy.Workflow.Persist", True)

    with opened(server, request.param == "vue", prepare=persist) as page:
        page.name = request.param
        yield page
    set_setting(server, "Comfy.Workflow.Persist", False)


def reload(page: Page) -> None:
    page.tab.wait_for_timeout(1500)  # the page saves its workflows now and then
    page.tab.reload()
    page.started()
    page.until("window.app.graph.nodes.some((node) => node.comfyClass === 'AutoRefinerSampler')")
    page.look_at(SAMPLER)


def widgets(page: Page, kind: str = SAMPLER) -> dict:
    return page.tab.evaluate(WIDGETS, kind)


def open_run(page: Page, server: Server, name: str, **inputs: object) -> None:
    """Open a workflow whose seed stays, and start it."""
    page.load(sampled(server, name, **inputs))
    page.set(SAMPLER, control_after_generate="fixed")
    page.tab.evaluate(
        "() => window.app.extensionManager.workflow.activeWorkflow.changeTracker"
        ".captureCanvasState()"
    )
    page.look_at(SAMPLER)
    page.still(SIZE, SAMPLER)
    page.queue()


def recipe_shown(page: Page, words: str) -> None:
    """Wait until a run with a recipe is over."""
    page.until(
        f"document.querySelector('.autorefiner-recipe')?.textContent === '{words}'"
        f" && document.querySelector('{STATUS}').textContent.includes('done')"
    )


def texts(server: Server, kind: str = SAMPLER) -> list[str]:
    """Return the text of a node in the newest prompt of the history."""
    newest = max(server.get("/history").values(), key=lambda entry: entry["prompt"][0])
    graph = newest["prompt"][2]
    return newest["outputs"].get(of_kind(graph, kind), {}).get("text", [])


def test_the_strip_fills_stays_and_comes_back(page: Page, server: Server) -> None:
    page.errors.clear()
    tab = page.tab
    open_run(page, server, "strip", length=117, seed=10 + len(page.name))
    before, size = tab.evaluate(MARKS), tab.evaluate(SIZE, SAMPLER)
    ended(page, "done")
    idle(server, page)
    assert tab.evaluate(MARKS) == before and tab.evaluate(SIZE, SAMPLER) == size
    assert tab.locator(FINISHED).count() == 10
    assert "chunk 10/10" in tab.inner_text(STATUS) and "frames/s" in tab.inner_text(STATUS)
    assert "first picture" in tab.inner_text(STATUS)
    picture(page, "strip")
    saved = tab.evaluate("() => window.app.graph.serialize()")
    assert not [key for key in of_class(saved, SAMPLER)["properties"] if "autorefiner" in key]
    assert page.errors == []
    reload(page)
    ended(page, "done")
    finished(page, 10)
    assert "first picture" in tab.inner_text(STATUS)
    tab.click(".autorefiner-tile >> nth=2")
    assert "chunk 3" in tab.inner_text(".autorefiner-dialog")
    tab.keyboard.press("ArrowRight")
    assert "chunk 4" in tab.inner_text(".autorefiner-dialog")
    picture(page, "enlarged")
    tab.keyboard.press("Escape")


def test_a_run_goes_on_after_a_reload_and_is_stopped(page: Page, server: Server) -> None:
    before = set(server.base.glob("output/stopped*.latent"))
    open_run(page, server, "stopped", length=LONG, seed=20 + len(page.name))
    page.tab.wait_for_selector(FINISHED)
    reload(page)
    page.until(f"document.querySelectorAll('{FINISHED}').length > 2")
    assert page.tab.is_visible(".autorefiner-stop") and "pass" in page.tab.inner_text(STATUS)
    page.tab.click(".autorefiner-stop")
    ended(page, "stopped")
    idle(server, page)
    picture(page, "stopped")
    count = page.tab.locator(FINISHED).count()
    assert f"{count}/334 chunks, {12 * count - 3} frames" in page.tab.inner_text(STATUS)
    (saved,) = set(server.base.glob("output/stopped*.latent")) - before
    assert load_file(saved)["latent_tensor"].shape[2] == 3 * count
    assert f"\n{count} of 334 chunks, {12 * count - 3} frames: stopped\n" in texts(server)[0]


def test_a_run_is_there_when_its_workflow_is_shown_again(page: Page, server: Server) -> None:
    open_run(page, server, "first_tab", length=161, seed=30 + len(page.name))
    page.tab.wait_for_selector(FINISHED)
    page.load(sampled(server, "second_tab", length=81, seed=1))
    page.until(f"document.querySelector('{STATUS}')?.textContent.startsWith('Chunks show here')")
    idle(server, page)
    assert page.tab.locator(FINISHED).count() == 0
    page.tab.locator(".workflow-tabs >> text=first_tab").click()
    ended(page, "done")
    finished(page, 14)


def test_chunks_are_rerolled_cut_and_added_from_the_strip(page: Page, server: Server) -> None:
    page.errors.clear()
    tab = page.tab
    open_run(page, server, "steered", length=81, seed=40 + len(page.name))
    ended(page, "done")
    page.set(SAMPLER, seed=7, control_after_generate="randomize")  # after the run
    size = tab.evaluate(SIZE, SAMPLER)
    for time in ("", ", 2 times"):
        tab.locator(".autorefiner-tile >> nth=4").press("Enter")
        tab.click("text=Reroll from here")
        recipe_shown(page, f"rerolled from chunk 5{time}")
    values = widgets(page)
    assert values["recipe"] == "reroll 5 2" and values["seed"] == 40 + len(page.name)
    assert values["control_after_generate"] == "fixed"
    assert tab.locator(".autorefiner-reused").count() == 4
    picture(page, "rerolled")
    tab.click(".autorefiner-tile >> nth=2")
    tab.click("text=Keep up to here")
    recipe_shown(page, "ends after chunk 3")
    finished(page, 3)
    tab.fill(".autorefiner-extend input", "2")
    tab.click("text=Extend by")
    recipe_shown(page, "ends after chunk 3, 2 chunks added")
    finished(page, 5)
    assert widgets(page)["recipe"] == "keep 3; extend 2"
    steps = tab.evaluate(MARKS)[1]
    assert tab.evaluate(SIZE, SAMPLER) == size  # or a run would be a step of undo
    tab.evaluate("() => window.app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    assert widgets(page)["recipe"] == "keep 3" and tab.evaluate(MARKS)[1] == steps - 1
    page.until(f"({STRIP})('{SAMPLER}').isConnected")  # of the new node
    page.look_at(SAMPLER)
    tab.click(".autorefiner-foot >> text=Clear")
    page.until("!document.querySelector('.autorefiner-recipe').textContent")
    finished(page, CHUNKS)
    idle(server, page)
    assert widgets(page)["recipe"] == "" and page.errors == []


@pytest.mark.usefixtures("stand_ins")
def test_a_chunk_rerolled_on_the_page_is_what_its_recipe_gives_without_a_page(
    page: Page, server: Server
) -> None:
    name = f"headless_{page.name}"
    open_run(page, server, name, length=45, seed=80 + len(page.name))
    ended(page, "done")
    page.tab.locator(".autorefiner-tile >> nth=1").press("Enter")
    page.tab.click("text=Reroll from here")
    recipe_shown(page, "rerolled from chunk 2")
    idle(server, page)
    first, rerolled = (
        load_file(path)["latent_tensor"] for path in sorted(server.base.glob(f"output/{name}*"))
    )
    newest = max(server.get("/history").values(), key=lambda entry: entry["prompt"][0])
    graph = small("text_to_video") | newest["prompt"][2]
    del graph["99"]  # SaveLatent
    assert graph[of_kind(graph, SAMPLER)]["inputs"]["recipe"] == "reroll 2"
    torch.testing.assert_close(rerolled, alone(server, graph), **NEAR)
    assert torch.equal(first[:, :, :3], rerolled[:, :, :3])
    assert (first[:, :, 3:6] - rerolled[:, :, 3:6]).abs().max() > 0.01


def test_a_prompt_is_added_to_the_timeline_at_a_chunk(page: Page, server: Server) -> None:
    graph = small("prompt_timeline")
    sampler = of_kind(graph, SAMPLER)
    graph = {key: graph[key] for key in ("1", "2", sampler)}
    del graph[sampler]["inputs"]["reflective_cache"]
    graph[sampler]["inputs"] |= {"length": 81, "seed": len(page.name)}
    graph[of_kind(graph, "AutoRefinerPromptTimeline")]["inputs"]["text"] = "0s a star\n4s a box"
    saved = graph_node("SaveLatent", samples=[sampler, 0], filename_prefix="timeline")
    page.load(written(server, "timed", graph | {"99": saved | {"_meta": {"title": "Save"}}}))
    page.look_at(SAMPLER)
    page.queue()
    ended(page, "done")
    tab = page.tab
    tab.click(".autorefiner-tile >> nth=3")
    tab.click("text=Prompt from here")
    tab.fill(".autorefiner-dialog textarea", "flush 1: a ring\nspins")
    picture(page, "prompt")
    tab.click(".autorefiner-dialog >> text=Queue")
    expected = "0s a star\nf33 flush 1: a ring spins\n4s a box"
    page.until("!document.querySelector('.autorefiner-dialog')")
    assert widgets(page, "AutoRefinerPromptTimeline")["text"] == expected
    page.until("document.querySelectorAll('.autorefiner-reused').length === 3")
    ended(page, "done")
    idle(server, page)
    assert "chunk 4, frame 33" in texts(server)[0]


def test_two_browsers_see_their_own_runs(page: Page, server: Server) -> None:
    path = sampled(server, "shared", length=81, seed=50 + len(page.name))
    graph = json.loads(path.read_text()) | {"id": f"0f0e0d0c-0000-4000-8000-{len(page.name):012}"}
    path.write_text(json.dumps(graph))
    with another(page, page.tab.url) as second:
        for each, length in ((page, 81), (second, 45)):
            each.load(path)
            each.look_at(SAMPLER)
            each.set(SAMPLER, length=length, seed=50 + length)
            each.queue()
        ended(page, "done")
        ended(second, "done")
        finished(page, 7)
        finished(second, 4)
        assert page.tab.locator(".autorefiner-tile").count() == 7
        for each, count in ((page, 7), (second, 4)):  # each gets its own back
            each.load(path)
            finished(each, count)


def test_a_notice_stays_on_the_node_and_in_the_history(page: Page, server: Server) -> None:
    graph = small("text_to_video")
    sampler = of_kind(graph, SAMPLER)
    graph = {key: graph[key] for key in sorted(graph, key=int)[: int(sampler)]}
    graph[of_kind(graph, "CLIPTextEncode")]["inputs"]["text"] = f"a zebra {page.name}"
    graph[sampler]["inputs"] |= {"length": 21, "seed": 60}
    saved = graph_node("SaveLatent", samples=[sampler, 0], filename_prefix="noted")
    page.load(written(server, "noted", graph | {"99": saved | {"_meta": {"title": "Save"}}}))
    page.set(SAMPLER, control_after_generate="fixed")
    page.look_at(SAMPLER)
    page.queue()
    ended(page, "done")
    idle(server, page)
    said = page.tab.inner_text(".autorefiner-text")
    assert "zebra" in said and "keys and values" in said
    assert "zebra" in texts(server)[0] and "chunks" in texts(server)[0].splitlines()[-1]
    picture(page, "noted")
    page.set("SaveLatent", filename_prefix="noted_again")
    page.queue()  # the sampler is cached
    page.tab.wait_for_timeout(300)
    idle(server, page)
    assert "zebra" in texts(server)[0]
    assert "zebra" in page.tab.inner_text(".autorefiner-text")


def test_given_chunks_are_shown_as_given(page: Page, server: Server) -> None:
    graph = small("text_to_video")
    sampler = of_kind(graph, SAMPLER)
    graph = {key: graph[key] for key in sorted(graph, key=int)[: int(sampler)]}
    first = graph_node("SaveLatent", samples=["80", 0], filename_prefix="given")
    graph["80"] = {
        "class_type": SAMPLER,
        "inputs": graph[sampler]["inputs"] | {"length": 21, "seed": 70},
        "_meta": {"title": "Begin"},
    }
    graph[sampler]["inputs"] |= {"length": 45, "seed": 71, "start": ["80", 0]}
    last = graph_node("SaveLatent", samples=[sampler, 0], filename_prefix="went_on")
    for key, each in (("90", first), ("99", last)):
        graph[key] = each | {"_meta": {"title": f"Save {key}"}}
    page.load(written(server, "given", graph))
    page.queue()
    page.until("document.querySelectorAll('.autorefiner-given').length === 2")
    page.until(f"document.querySelectorAll('{FINISHED}').length === 6")
    page.fit()
    picture(page, "given")
    tile = page.tab.locator(".autorefiner-given").first
    assert "given" in tile.inner_text()
    assert tile.locator(".autorefiner-picture").evaluate("(e) => e.style.backgroundImage")
    idle(server, page)


def test_the_strip_of_a_sampler_shows_on_the_node_that_made_it(page: Page, server: Server) -> None:
    page.errors.clear()
    page.load(WORKFLOWS / "sampler_custom_advanced.json")
    page.look_at("AutoRefinerCustomSampler")
    page.set("EmptyARVideoLatent", length=21)
    page.queue()
    ended(page, "done")
    seed = widgets(page, "RandomNoise")
    page.tab.click(".autorefiner-tile >> nth=1")
    page.tab.click("text=Reroll from here")
    recipe_shown(page, "rerolled from chunk 2")
    now = widgets(page, "RandomNoise")
    assert now["control_after_generate"] == "fixed"
    assert now["noise_seed"] != seed["noise_seed"] or seed["control_after_generate"] == "fixed"
    idle(server, page)
    picture(page, "strip-custom")
    assert page.errors == []
