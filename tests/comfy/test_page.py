"""The page in a real browser: `pytest -m page`, with ComfyUI, Chromium and playwright."""

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from comfy_graphs import WORKFLOWS, of_kind, small
from comfy_graphs import node as graph_node
from comfy_page import TELLING
from comfy_server import Server, find_comfyui
from graph_drawing import drawing_of, meet, overlap, runs_under, surrounds
from page_browser import NODES, Page, complaints, find_chromium, opened, touch_files
from page_runs import idle, picture, written
from workflow_layouts import CROSSINGS

from autorefiner.refiner.files import partial_path
from autorefiner.refiner.video import VideoWriter

from decoding import decoded

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium"),
]
FILES = sorted(WORKFLOWS.glob("*.json"))
SOCKET_INSET = 11  # pixels from a node's edge to its sockets, at most
SIZES = "() => window.app.graph.nodes.map(({ id, size }) => [id, ...size])"


@pytest.fixture(scope="module", params=["standard", "vue"])
def page(request, server: Server) -> Iterator[Page]:
    touch_files(server.base)
    with opened(server, request.param == "vue") as page:
        page.name = request.param
        yield page


def overlapping(page: Page) -> list[tuple[int, int]]:
    """Return the pairs of nodes drawn on top of each other."""
    boxes = page.boxes()
    return [pair for pair in combinations(boxes, 2) if overlap(*(boxes[node] for node in pair))]


def crossings(page: Page) -> int:
    """Count the pairs of links of different outputs that cross."""
    return sum(
        source != other and meet(corners, others)
        for (source, corners), (other, others) in combinations(page.links(), 2)
    )


def unclear(page: Page, workflow: Path) -> list[str]:
    """Return the links drawn under nodes, and the nodes drawn outside of the groups."""
    groups = drawing_of(json.loads(workflow.read_text(encoding="utf-8"))).groups
    boxes = page.boxes()
    inner = {  # the classic renderer's links begin and end within their nodes
        node: (left + SOCKET_INSET, top, right - SOCKET_INSET, bottom)
        for node, (left, top, right, bottom) in boxes.items()
    }
    note = max(boxes)
    return [
        *(f"{source} runs under {node}" for source, corners in page.links()
          for node, box in inner.items() if runs_under(corners, box)),
        *(f"{node} is in no group" for node, box in boxes.items() if node != note
          and not any(surrounds(group, box) for group in groups)),
    ]  # fmt: skip


@pytest.mark.parametrize("workflow", FILES, ids=lambda path: path.stem)
def test_workflows_open_without_a_complaint(workflow: Path, page: Page) -> None:
    assert complaints(page, workflow) == []
    assert overlapping(page) == []
    assert unclear(page, workflow) == []
    assert crossings(page) <= CROSSINGS.get(workflow.stem, 0)
    picture(page, workflow.stem)
    sizes = page.still(SIZES)
    page.tab.evaluate(
        """([kinds, text]) => {
            const { api, graph } = window.app;
            for (const node of graph.nodes.filter((node) => kinds.includes(node.comfyClass))) {
                api.dispatchCustomEvent("progress_text", { nodeId: String(node.id), text });
            }
        }""",
        [TELLING, "a line of text, and another, and " * 20],
    )
    page.tab.wait_for_timeout(300)
    page.settle()
    assert page.tab.evaluate(SIZES) == sizes  # or a run would modify its workflow
    assert page.errors == []
    picture(page, f"{workflow.stem}-told")


PLAYED = """(address) => new Promise((done) => {
    const video = document.createElement("video");
    video.muted = true;
    video.playbackRate = 8;
    video.onended = () => done(["ended", video.currentTime, video.duration, video.videoWidth]);
    video.onerror = () => done(["error", video.error.message]);
    video.src = address;
    document.body.append(video);
    video.play();
})"""


def test_written_videos_play_to_their_end(page: Page, server: Server) -> None:
    """Finished and partial files, with chunk patterns as decoders and presets write them."""
    folder = server.base / "output" / "played"
    folder.mkdir(exist_ok=True)
    for pattern in ((1, 4, 4, 4), (1, 8, 8), (9, 12), (1, 1, 1)):
        name = "_".join(map(str, pattern))
        for end in ("finished", "partial"):
            path = folder / f"{name}_{end}.mp4"
            with suppress(KeyboardInterrupt), VideoWriter(path, 64, 48) as video:
                for length in pattern:
                    video.write(np.full((length, 48, 64, 3), 20 * length, np.uint8))
                if end == "partial":
                    raise KeyboardInterrupt
            shown = path if end == "finished" else partial_path(path)
            address = f"/view?filename={shown.name}&type=output&subfolder=played"
            how, *places = page.tab.evaluate(PLAYED, address)
            assert how == "ended", f"{shown.name}: {places}"
            assert places[:2] == pytest.approx([sum(pattern) / 16] * 2, abs=0.07)
            assert places[2] == 64


def test_a_lora_loader_that_is_given_a_refiner_is_told(page: Page, server: Server) -> None:
    name = "page_test.refiner.safetensors"
    (server.base / "models" / "loras" / name).touch()
    page.tab.evaluate("() => window.app.graph.clear()")
    for kind, value, count in (
        ("LoraLoaderModelOnly", "plain.safetensors", 0),
        ("LoraLoaderModelOnly", name, 1),
    ):
        page.tab.evaluate(
            """([kind, value]) => {
                const node = LiteGraph.createNode(kind);
                window.app.graph.add(node);
                const widget = node.widgets.find((widget) => widget.name === "lora_name");
                widget.value = value;
                widget.callback(value);
            }""",
            [kind, value],
        )
        page.settle()
        page.tab.wait_for_timeout(300)
        page.until(f"document.querySelectorAll('.p-toast-message').length >= {count}")
        texts = page.tab.locator(".p-toast").all_inner_texts()
        assert sum("Load Refiner LoRA" in text for text in texts) == count
    picture(page, "lora-notice")
    (server.base / "models" / "loras" / name).unlink()


def test_a_decoded_video_brings_its_workflow_back(page: Page, server: Server) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"] |= {"length": 5, "seed": 40 + len(page.name)}
    name = f"dropped_{page.name}"
    graph["4"] = graph_node(
        "AutoRefinerDecodeToVideo", samples=["3", 0], vae=["1", 2], fps=16, filename_prefix=name
    )
    graph["4"]["_meta"] = {"title": "Decode"}
    graph = {key: graph[key] for key in "1234"}
    page.load(written(server, name, graph))
    page.queue()
    path = server.base / "output" / f"{name}_00001_.mp4"
    while not path.exists():
        page.tab.wait_for_timeout(100)
    idle(server, page)
    assert len(decoded(path)) == 5
    page.tab.evaluate("() => window.app.graph.clear()")
    page.tab.evaluate(
        """async (name) => {
            const data = await (await fetch(`/view?filename=${name}&type=output`)).blob();
            const transfer = new DataTransfer();
            transfer.items.add(new File([data], name, { type: "video/mp4" }));
            const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
            document.dispatchEvent(new DragEvent("drop", options));
        }""",
        path.name,
    )
    page.until("window.app.graph.nodes.length === 4")
    kinds = page.tab.evaluate("() => window.app.graph.nodes.map((node) => node.type).sort()")
    assert kinds == sorted(node["class_type"] for node in graph.values())


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
    tab, times = (
        page.tab,
        "() => [...document.querySelectorAll('.autorefiner-video')].map((one) => one.currentTime)",
    )
    page.until(f"({times})().every((time) => time > 0.1)")
    tab.evaluate("() => { document.querySelector('.autorefiner-refined').playbackRate = 0.25; }")
    page.until(f"(([base, refined]) => base > 0.8 && base - refined < 0.15)(({times})())")
    tab.locator(".autorefiner-compare input").fill("8")
    page.until(f"({times})().every((time) => time === 8.5 / 16)")
    assert tab.inner_text(".autorefiner-compare .autorefiner-status") == "9/21"
    box = tab.locator(".autorefiner-screen").bounding_box()
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 40)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 40)
    tab.mouse.up()
    left = tab.evaluate(
        "() => Number.parseFloat(document.querySelector('.autorefiner-line').style.left)"
    )
    assert abs(left - 25) < 1
    idle(server, page)
    picture(page, "compare")
    assert page.errors == []


def test_a_training_shows_its_curves_and_sheets_and_comes_back(
    page: Page, server: Server, peft_inside: None
) -> None:
    graph = small("train_a_refiner")
    trainer = of_kind(graph, "AutoRefinerTrainRefiner")
    # The nodes up to the training, without the videos made with its result.
    graph = {key: graph[key] for key in sorted(graph, key=int)[: int(trainer)]}
    graph[trainer]["inputs"] |= {"run": f"page {page.name}", "steps": 6, "preview_every": 3}
    path = written(server, "training", graph)
    page.errors.clear()
    page.load(path)
    page.look_at("AutoRefinerTrainRefiner")
    page.queue()
    tab, status = page.tab, ".autorefiner-trainer .autorefiner-status"
    page.until(f"document.querySelector('{status}').textContent.includes('done')")
    assert "step 6/6" in tab.inner_text(status)
    page.until("document.querySelector('.autorefiner-sheet').naturalWidth > 100")
    assert tab.locator(f"{NODES} img").count() == (page.name == "vue")  # else on a canvas
    assert not tab.evaluate("() => window.app.graph.nodes.some((node) => node.imgs?.length)")
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
    page.until(
        "['step 6/6', 'done'].every((text) => "
        f"document.querySelector('{status}').textContent.includes(text))"
    )
    assert tab.get_attribute(".autorefiner-curve polyline >> nth=0", "points") == points
    assert page.errors == []


def test_the_cache_draws_what_a_chunk_sees_as_its_widgets_say(page: Page) -> None:
    def drawn() -> dict[str, int]:
        kinds = ("sink", "gone", "recent", "now", "previous")
        return {
            kind: page.tab.locator(f".autorefiner-drawing .autorefiner-{kind}").count()
            for kind in kinds
        }

    def says(part: str) -> None:
        page.until(f"document.querySelector('.autorefiner-memory').innerText.includes('{part}')")

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
    says("window")
    assert [error for error in page.errors if "autorefiner/cache" not in error] == []
