"""The strip without a server: states that the server holds, recipes, and what is not believed."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blueprints import FOLDER, NAME
from comfy_graphs import WORKFLOWS
from page_browser import STATUS, Page
from page_words import words
from PIL import Image
from recorded_events import CHUNK, in_the_page, status, tell
from recorded_page import replayed

from autorefiner.refiner.recipe import parse_recipe

EN = words()["en"]


@pytest.fixture(scope="module", params=["standard", "vue"])
def page(request) -> Iterator[Page]:
    with replayed(request.param == "vue") as page:
        page.tab.set_default_timeout(60_000)
        yield page


def answer(route: Any, state: dict) -> None:
    """Answer a request for runs with one state for every node that it asks for."""
    asked = json.loads(route.request.post_data)
    common = {"workflow": asked["workflow"], **state}
    route.fulfill(json={"runs": {node: {"node": node, **common} for node in asked["nodes"]}})


def answer_runs(page: Page, state: dict) -> None:
    """Answer the page's next requests for runs with a state."""
    page.tab.unroute("**/autorefiner/runs")
    page.tab.route("**/autorefiner/runs", lambda route: answer(route, state))


TILES = [
    {"chunk": 0, "start": 0, "end": 9, "level": 1, "levels": 1, "given": True},
    {"chunk": 1, "start": 9, "end": 21, "level": 4, "levels": 4},
    {"chunk": 2, "start": 21, "end": 33, "level": 2, "levels": 4},
]
STATE = {"prompt": "a", "run": 1, "sequence": 9, "chunks": 7, "frames": 81, "first": 9,
         "elapsed": 4.0, "tiles": TILES}  # fmt: skip


@in_the_page
@pytest.mark.parametrize("how", ["failed", "interrupted", "running"])
def test_a_run_comes_back_as_it_ended(page: Page, how: str) -> None:
    answer_runs(page, STATE | {"status": how, "notices": ["<b>a notice</b>"]})
    page.load(WORKFLOWS / "text_to_video.json")
    wanted = "pass 2/4" if how == "running" else f"{how}, 4 s"
    page.until(f"document.querySelector('{STATUS}')?.textContent.includes('{wanted}')")
    assert page.tab.get_attribute(".autorefiner-strip", "data-status") == how
    assert page.tab.is_visible(".autorefiner-stop") == (how == "running")
    assert page.tab.locator(".autorefiner-finished").count() == 2
    assert page.tab.inner_text(".autorefiner-given .autorefiner-mark") == EN["given"]
    assert page.tab.inner_text(".autorefiner-text") == "<b>a notice</b>"


@in_the_page
@pytest.mark.parametrize("newest", [0, 1])
@pytest.mark.parametrize("known", [1, 2])
def test_a_subgraph_that_is_used_twice_shows_the_run_that_began_last(
    page: Page, newest: int, known: int
) -> None:
    graph = json.loads((FOLDER / f"{NAME}.json").read_text(encoding="utf-8"))
    (first,) = graph["nodes"]
    graph["nodes"].append(first | {"id": first["id"] + 1, "pos": [900, 0]})

    def answer(route) -> None:
        ids = json.loads(route.request.post_data)["nodes"]
        running = STATE | {"node": ids[newest], "run": 2, "status": "running"}
        ended = STATE | {"node": ids[1 - newest], "run": 1, "status": "done"}
        states = (running, ended)[:known]
        route.fulfill(json={"runs": {state["node"]: state for state in states}})

    page.tab.unroute("**/autorefiner/runs")
    page.tab.route("**/autorefiner/runs", answer)
    page.tab.evaluate("(graph) => window.app.loadGraphData(graph)", graph)
    shown = """() => window.app.graph.nodes[0].subgraph?.nodes
        .flatMap(({ widgets }) => widgets ?? [])
        .find(({ name }) => name === "chunks").element.dataset.status"""
    page.until(f"!['idle', undefined].includes(({shown})())")
    page.settle()
    assert page.tab.evaluate(shown) == "running"
    page.tab.unroute("**/autorefiner/runs")


@in_the_page
def test_what_an_earlier_run_said_gives_way_to_the_notices_of_a_new_one(page: Page) -> None:
    answer_runs(page, STATE | {"status": "done", "notices": ["of a"]})
    page.load(WORKFLOWS / "text_to_video.json")
    page.until("document.querySelector('.autorefiner-text')?.textContent === 'of a'")
    page.tab.evaluate(
        """() => {
            const isSampler = ({ comfyClass }) => comfyClass === "AutoRefinerSampler";
            const node = window.app.graph.nodes.find(isSampler);
            const told = { nodeId: String(node.id), text: "said by a" };
            window.app.api.dispatchCustomEvent("progress_text", told);
        }"""
    )
    assert page.tab.inner_text(".autorefiner-text") == "said by a"
    tell(page, "chunk", prompt="b", workflow="this", notices=["of b"], **CHUNK)
    assert page.tab.inner_text(".autorefiner-text") == "of b"


@in_the_page
def test_an_older_answer_does_not_undo_newer_events(page: Page) -> None:
    page.tab.unroute("**/autorefiner/runs")
    page.load(WORKFLOWS / "text_to_video.json")
    page.tab.wait_for_timeout(200)
    tell(
        page,
        "chunk",
        prompt="a",
        workflow="this",
        **CHUNK | {"sequence": 12, "chunk": 2, "level": 3},
    )
    answer_runs(page, STATE | {"status": "running", "elapsed": 1.0})
    page.tab.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
    page.until("document.querySelectorAll('.autorefiner-finished').length === 2")
    assert "chunk 3/7 · pass 3/4 · 3.4 frames/s" in status(page)  # three quarters of 9 in 2 s
    tell(page, "chunk", prompt="b", workflow="this", **CHUNK)
    page.tab.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
    page.until("document.querySelectorAll('.autorefiner-finished').length === 2")  # of the server


@in_the_page
def test_a_chunk_keeps_its_picture_until_there_is_another(page: Page) -> None:
    page.tab.unroute("**/autorefiner/runs")
    page.load(WORKFLOWS / "text_to_video.json")
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "JPEG")
    shown = {"image": base64.b64encode(data.getvalue()).decode(), "pictures": 1}
    tell(page, "chunk", prompt="a", workflow="this", **CHUNK, **shown)
    tell(page, "chunk", prompt="a", workflow="this", **CHUNK | {"level": 2})
    first, second = page.tab.locator(".autorefiner-tile").all()[:2]
    assert first.is_enabled() and second.is_disabled()
    page.look_at("AutoRefinerSampler")
    first.click()
    assert page.tab.is_visible(".autorefiner-large")
    page.tab.keyboard.press("Escape")


@in_the_page
def test_an_answer_about_an_earlier_run_does_not_hide_one_that_began_since(page: Page) -> None:
    page.tab.unroute("**/autorefiner/runs")
    page.load(WORKFLOWS / "text_to_video.json")
    page.tab.wait_for_timeout(200)
    asked = []
    page.tab.route("**/autorefiner/runs", lambda route: asked.append(route))
    with page.tab.expect_request("**/autorefiner/runs"):
        page.tab.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
    tell(page, "chunk", prompt="b", workflow="this", **CHUNK)
    with page.tab.expect_response("**/autorefiner/runs"):
        answer(asked[0], STATE | {"status": "done"})
    page.tab.wait_for_timeout(200)
    assert "pass 1/4" in status(page)
    assert page.tab.locator(".autorefiner-finished").count() == 0


@in_the_page
def test_a_run_that_the_server_has_forgotten_was_interrupted(page: Page) -> None:
    page.load(WORKFLOWS / "text_to_video.json")
    page.tab.wait_for_timeout(200)
    tell(page, "chunk", prompt="a", workflow="this", **CHUNK)
    page.tab.unroute("**/autorefiner/runs")
    page.tab.route("**/autorefiner/runs", lambda route: route.fulfill(json={"runs": {}}))
    page.tab.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
    page.until(f"document.querySelector('{STATUS}').textContent.includes('interrupted')")
    assert "interrupted" in status(page) and "pass" not in status(page)
    page.tab.unroute("**/autorefiner/runs")


@in_the_page
def test_a_prompt_is_placed_in_the_clip_as_it_was_before_its_recipe(page: Page) -> None:
    answer_runs(page, STATE | {"status": "done", "frames": 33, "length": 81, "recipe": "keep 3"})
    page.load(WORKFLOWS / "prompt_timeline.json")
    page.until("document.querySelectorAll('.autorefiner-finished').length === 2")
    page.look_at("AutoRefinerSampler")
    page.tab.click(".autorefiner-tile >> nth=1")
    page.tab.click(f"text={EN['prompt here']}")
    page.tab.fill(".autorefiner-dialog textarea", "a ring")
    with page.tab.expect_request("**/autorefiner/timeline") as asked:
        page.tab.click(f".autorefiner-dialog >> text={EN['queue']}")
    sent = json.loads(asked.value.post_data)
    place = {name: sent[name] for name in ("start", "before", "frames", "prompt")}
    assert place == {"start": 9, "before": 0, "frames": 81, "prompt": "a ring"}
    page.tab.click(f".autorefiner-dialog >> text={EN['close']}")
    page.tab.unroute("**/autorefiner/runs")


EVIL = "<img src=x onerror='window.owned = 1'>"


@in_the_page
def test_a_state_from_anywhere_cannot_put_markup_into_the_page(page: Page) -> None:
    page.errors.clear()
    chunk = {"chunk": 0, "level": 4, "levels": 4, "start": EVIL, "end": 9, "image": f'/9j/"){EVIL}',
             "pictures": 1}  # fmt: skip
    away = {"filename": "sheet_1.png", "subfolder": "autorefiner/../.."}
    curves = {EVIL: [[0, 1], [1, 2]], "loss": [["x", EVIL]], "long": [[0, 1]] * 5000}
    odd = [None, 7, {"chunk": -1}, {"chunk": 1e9}, chunk]
    state = {"prompt": "a", "run": 1, "sequence": 1, "chunks": 7, "tiles": odd, "status": "done"}
    answer_runs(page, state | {"elapsed": EVIL, "recipe": EVIL, "notices": [EVIL, 7], "seed": EVIL,
                               "first_picture": EVIL, "step": EVIL, "steps": 9, "curves": curves,
                               "sheet": away})  # fmt: skip
    page.load(WORKFLOWS / "train_a_refiner.json")
    page.until("document.querySelectorAll('.autorefiner-finished').length > 0")
    names = page.tab.locator(".autorefiner-curve text:first-of-type").all_text_contents()
    assert names == [EVIL[:40]]
    assert page.tab.get_attribute(".autorefiner-sheet", "src") == ""
    assert page.tab.evaluate(
        "() => window.owned === undefined && !document.querySelector('img[src=x]')"
    )
    answer_runs(page, state | {"status": EVIL, "tiles": EVIL, "chunks": EVIL, "notices": EVIL})
    page.load(WORKFLOWS / "text_to_video.json")
    page.tab.wait_for_timeout(200)
    assert status(page) == EN["idle"] and page.errors == []
    page.tab.unroute("**/autorefiner/runs")


@in_the_page
def test_runs_that_workflows_kept_are_removed_without_a_change(page: Page, tmp_path: Path) -> None:
    graph = json.loads((WORKFLOWS / "train_a_refiner.json").read_text(encoding="utf-8"))
    for each in graph["nodes"]:
        each["properties"] |= {"autorefiner_chunks": {"total": 7}, "autorefiner_training": {}}
    path = tmp_path / "former_runs.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    page.load(path)
    left, modified = page.tab.evaluate(
        """() => {
            const { graph, extensionManager } = window.app;
            const workflow = extensionManager.workflow.activeWorkflow;
            workflow.changeTracker.captureCanvasState();
            const kinds = ["AutoRefinerSampler", "AutoRefinerTrainRefiner"];
            const nodes = graph.nodes.filter((node) => kinds.includes(node.comfyClass));
            const names = nodes.flatMap((node) => Object.keys(node.properties));
            return [names.filter((name) => name.startsWith("autorefiner_")), workflow.isModified];
        }"""
    )
    assert left == [] and modified is False


@in_the_page
@pytest.mark.parametrize(
    ("recipe", "command", "chunks", "expected"),
    [
        ("", "reroll 5", 7, "reroll 5"),
        ("reroll 5; reroll 3 2", "reroll 5", 7, "reroll 5 2; reroll 3 2"),
        ("reroll 5; keep 6; reroll 2", "keep 3", 6, "reroll 2; keep 3"),
        ("keep 5; extend 2", "keep 3", 7, "keep 3"),
        ("keep 5; extend 2", "keep 6", 7, "keep 5; extend 2; keep 6"),
        ("extend 2; keep 5", "keep 4", 5, "extend 2; keep 4"),
        ("reroll 2", "keep 7", 7, "reroll 2"),
        ("keep 3; extend 1", "extend 2", 4, "keep 3; extend 3"),
    ],
)
def test_a_recipe_takes_a_command_in_the_fewest_words(
    page: Page, recipe: str, command: str, chunks: int, expected: str
) -> None:
    found = page.tab.evaluate(
        """async ([recipe, command, chunks]) => {
            const module = "/extensions/autorefiner/recipe.js";
            const { formatRecipe, parseRecipe, steered } = await import(module);
            return formatRecipe(steered(parseRecipe(recipe), parseRecipe(command)[0], chunks));
        }""",
        [recipe, command, chunks],
    )
    assert found == expected
    assert parse_recipe(found).commands  # as the server reads it


@in_the_page
def test_the_page_reads_the_recipes_that_the_server_reads(page: Page) -> None:
    readable = ["", " reroll 5 ;; keep 3 ", "reroll 5 2"]
    texts = [*readable, "keep 3 2", "reroll 0", "keep", "extend 4097", "reroll 1; cut 2", "keep ٣"]
    found = page.tab.evaluate(
        """async (texts) => {
            const { formatRecipe, parseRecipe } = await import("/extensions/autorefiner/recipe.js");
            return texts.map(parseRecipe).map((commands) => commands && formatRecipe(commands));
        }""",
        texts,
    )

    def read(text: str) -> str | None:
        try:
            return str(parse_recipe(text))
        except ValueError:
            return None

    assert found == list(map(read, texts))
    assert found[:4] == ["", "reroll 5; keep 3", "reroll 5 2", None]
