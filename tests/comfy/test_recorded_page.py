"""The page without a server: workflows open in the frontend package, with recorded answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_graphs import WORKFLOWS
from comfy_page import inputs_of
from comfy_server import Server, find_comfyui
from page_browser import STATUS, Page, complaints
from page_words import words
from recorded_events import CHUNK, in_the_page, status, tell
from recorded_page import FILES, RECORDED, kinds, replayed

EN, ZH = (words()[language] for language in ("en", "zh"))


@pytest.fixture(scope="module", params=["standard", "vue"])
def page(request) -> Iterator[Page]:
    with replayed(request.param == "vue") as page:
        yield page


@in_the_page
@pytest.mark.parametrize("workflow", FILES, ids=lambda path: path.stem)
def test_workflows_open_where_no_server_is(workflow: Path, page: Page) -> None:
    assert complaints(page, workflow) == []


@in_the_page
def test_a_run_of_another_workflow_stays_out_of_this_one(page: Page) -> None:
    page.load(WORKFLOWS / "train_a_refiner.json")
    idle, untrained = status(page), status(page, "trainer")
    training = {"step": 3, "steps": 9, "elapsed": 6.0, "curves": {}}
    tell(page, "chunk", prompt="a", workflow="another", **CHUNK)
    tell(page, "train", prompt="a", workflow="another", **training)
    assert (status(page), status(page, "trainer")) == (idle, untrained)
    tell(page, "chunk", prompt="a", workflow="this", **CHUNK)
    tell(page, "train", prompt="a", workflow=None, **training)  # a prompt from no page
    assert "chunk 1/7" in status(page) and "step 3/9" in status(page, "trainer")
    tell(page, "chunk", prompt="b", workflow="another", status="interrupted")
    assert "interrupted" not in status(page)


@in_the_page
def test_a_video_of_the_workflow_before_stays_out_of_this_one(page: Page) -> None:
    """Its node has the same id, and the server answers after another workflow was opened."""
    waiting = []
    page.tab.route("**/autorefiner/live?workflow=*", lambda route: waiting.append(route), times=1)
    page.load(WORKFLOWS / "text_to_video.json")
    before, node = page.tab.evaluate(
        """() => {
            const isSampler = ({ comfyClass }) => comfyClass === "AutoRefinerSampler";
            const { graph } = window.app;
            return [graph.id, String(graph.nodes.find(isSampler).id)];
        }"""
    )
    path = WORKFLOWS / "text_to_video.json"
    other = json.loads(path.read_text(encoding="utf-8")) | {"id": "another"}
    page.tab.evaluate("(graph) => window.app.loadGraphData(graph)", other)
    page.settle()
    record = {"video": "0" * 32, "node": node, "fragments": 0, "note": "of the workflow before"}
    while not waiting:
        page.tab.wait_for_timeout(50)
    waiting[0].fulfill(json={"videos": [record | {"workflow": before}]})
    tell(page, "chunk", prompt="a", workflow="this", **CHUNK)
    page.tab.wait_for_timeout(200)
    assert page.tab.locator(".autorefiner-live", has_text="of the workflow").count() == 0


@in_the_page
def test_a_second_run_of_a_prompt_begins_anew(page: Page) -> None:
    page.load(WORKFLOWS / "text_to_video.json")
    for place, end in enumerate((9, 21)):
        told = CHUNK | {"chunk": place, "level": 4, "end": end}
        tell(page, "chunk", prompt="a", workflow="this", **told)
    tell(page, "chunk", prompt="a", workflow="this", run=1, status="stopped", elapsed=2.0)
    assert "2/7 chunks, 21 frames · " in status(page) and "stopped" in status(page)
    assert not page.tab.is_visible(".autorefiner-stop")
    tell(page, "chunk", prompt="a", workflow="this", **CHUNK | {"run": 2})
    assert "stopped" not in status(page) and "pass 1/4" in status(page)
    assert (
        page.tab.is_visible(".autorefiner-stop")
        and page.tab.locator(".autorefiner-finished").count() == 0
    )


@in_the_page
def test_a_stop_that_got_no_answer_may_be_asked_again(page: Page) -> None:
    page.load(WORKFLOWS / "text_to_video.json")
    tell(page, "chunk", prompt="a", workflow="this", **CHUNK)
    page.look_at("AutoRefinerSampler")
    page.tab.route("**/autorefiner/stop", lambda route: route.abort(), times=1)
    for says in ("no answer", "stopping"):
        page.tab.click(".autorefiner-stop")
        page.until(f"document.querySelector('.autorefiner-stop').textContent === '{EN[says]}'")
    assert page.tab.is_disabled(".autorefiner-stop")


@in_the_page
def test_a_late_answer_to_a_stop_says_nothing_of_the_next_run(page: Page) -> None:
    page.load(WORKFLOWS / "text_to_video.json")
    tell(page, "chunk", prompt="a", workflow="this", **CHUNK)
    page.look_at("AutoRefinerSampler")
    waiting = []
    page.tab.route("**/autorefiner/stop", lambda route: waiting.append(route), times=1)
    with page.tab.expect_request("**/autorefiner/stop"):
        page.tab.click(".autorefiner-stop")
    tell(page, "chunk", prompt="b", workflow="this", **CHUNK)
    waiting[0].fulfill(status=404, json={})
    page.tab.wait_for_timeout(200)
    assert page.tab.inner_text(".autorefiner-stop") == EN["stop"]


@in_the_page
def test_a_cache_that_got_no_answer_asks_again(page: Page) -> None:
    page.load(WORKFLOWS / "self_forcing_refiner.json")
    drawn = "document.querySelectorAll('.autorefiner-drawing rect').length"
    page.until(f"{drawn} > 0")
    asked = []

    def refuse(route) -> None:
        asked.append(route)
        if len(asked) == 1:
            route.abort()

    page.tab.route("**/autorefiner/cache", refuse, times=2)
    page.set("AutoRefinerReflectiveCache", window=20)
    page.until(f"{drawn} === 0")
    while len(asked) < 2:
        page.tab.wait_for_timeout(50)
    asked[1].fallback()
    page.until(f"{drawn} > 0")
    assert page.tab.locator(".autorefiner-drawing rect").first.is_visible()


@in_the_page
def test_a_cache_from_before_its_last_widgets_gets_their_defaults(
    page: Page, tmp_path: Path
) -> None:
    graph = json.loads((WORKFLOWS / "self_forcing.json").read_text(encoding="utf-8"))
    (cache,) = (each for each in graph["nodes"] if each["type"] == "AutoRefinerReflectiveCache")
    cache["widgets_values"] = [9, 3, "relative", "as trained", "as trained"]
    path = tmp_path / "former.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    page.load(path)
    values = page.tab.evaluate(
        """() => {
            const kind = "AutoRefinerReflectiveCache";
            const node = window.app.graph.nodes.find((node) => node.comfyClass === kind);
            return Object.fromEntries(node.widgets.map(({ name, value }) => [name, value]));
        }"""
    )
    former = {"window": 9, "sink": 3, "positions": "relative"}
    added = {"memory": "the model's", "memory_settings": "", "store": "plain"}
    assert {name: values[name] for name in former | added} == former | added


@in_the_page
def test_a_linked_widget_says_what_it_is_linked_to(page: Page) -> None:
    found = page.tab.evaluate(
        """async () => {
            const { valueOf } = await import("/extensions/autorefiner/graph.js");
            const of = (linked) => valueOf({
                inputs: [{ name: "length" }],
                getInputNode: () => linked,
                widgets: [{ name: "length", value: 81 }],
            }, "length");
            const widget = { name: "value", value: 9 };
            return [of(null), of({ widgets: [widget] }), of({ widgets: [] }) === undefined];
        }"""
    )
    assert found == [81, 9, True]


@in_the_page
def test_reroutes_are_looked_through_even_in_a_circle(page: Page) -> None:
    found = page.tab.evaluate(
        """async () => {
            const { source, targets } = await import("/extensions/autorefiner/graph.js");
            const [loader, sampler] = [{ type: "loader" }, { type: "sampler" }];
            const reroute = (from, to) => ({
                type: "Reroute", outputs: [{}], getInputNode: () => from, getOutputNodes: () => to,
            });
            const circle = reroute(null, []);
            circle.getInputNode = () => circle;
            circle.getOutputNodes = () => [circle, circle];
            const node = (from, to) => ({
                inputs: [{ name: "model" }], outputs: [{}], getInputNode: () => from,
                getOutputNodes: () => to,
            });
            const twice = reroute(null, [reroute(null, [sampler])]);
            const far = node(reroute(reroute(loader), []), [twice]);
            const lost = node(circle, [circle]);
            return [
                source(far, "model").type, targets(far)[0].type,
                source(lost, "model"), targets(lost).length,
            ];
        }"""
    )
    assert found == ["loader", "sampler", None, 0]


@in_the_page
def test_the_page_speaks_chinese_where_the_locale_is(page: Page) -> None:
    def speak(locale: str) -> None:
        """Change the locale; the page then reopens its workflow."""
        page.load(WORKFLOWS / "text_to_video.json")
        page.tab.evaluate(
            "(locale) => window.app.extensionManager.setting.set('Comfy.Locale', locale)", locale
        )
        page.until(
            f"document.querySelector('{STATUS}')?.textContent === '{words()[locale]['idle']}'"
        )

    speak("zh")
    page.load(WORKFLOWS / "train_a_refiner.json")
    shown = {widget: status(page, widget) for widget in ("head", "trainer", "compare")}
    tell(page, "chunk", prompt="a", workflow="this", **CHUNK)
    chunk, button = status(page), page.tab.inner_text(".autorefiner-stop")
    speak("en")
    assert shown == {
        "head": ZH["idle"],
        "trainer": ZH["no training"],
        "compare": ZH["nothing compared"],
    }
    assert chunk.startswith(f"{ZH['chunk']} 1/7 · {ZH['pass']} 1/4") and button == ZH["stop"]


@pytest.mark.comfyui
@pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")
def test_what_is_recorded_is_what_the_server_says(server: Server) -> None:
    recorded, now = (
        json.loads(RECORDED.read_text(encoding="utf-8"))["/object_info"],
        server.get("/object_info"),
    )
    assert recorded.keys() == kinds() & now.keys()
    for kind, before in recorded.items():
        for definition in (before, now[kind]):
            definition["sockets"] = [
                (name, sort, widget) for name, sort, _, widget in inputs_of(definition)
            ]
        for part in ("sockets", "output", "output_name"):
            assert before[part] == now[kind][part], (
                f"{kind} has changed: python tests/recorded_page.py"
            )
