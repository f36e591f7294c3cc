"""The page plays the video of a run while it is made: `pytest -m page`.

PAGE_PICTURES names a folder for screenshots.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_graphs import node, of_kind, small
from comfy_page import to_page
from comfy_server import Server, find_comfyui, install_pack
from demo_files import write_base
from page_browser import LOCAL, Page, another, find_chromium, opened, quiet, set_setting
from page_runs import picture

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium"),
]
SAMPLER, VIDEO = "AutoRefinerSampler", ".autorefiner-live-video"
LONG = 4001  # frames: longer than a test takes
LINE = ".autorefiner-live .autorefiner-status"
# What is seen of the video at every event of a chunk: [chunk, chunks, time, whether it plays and
# can be sought in].
LOG = """() => {
    window.seen = [];
    window.app.api.addEventListener("autorefiner.chunk", ({ detail }) => {
        const video = document.querySelector(".autorefiner-live-video");
        const { chunk, chunks } = detail;
        if (!video || !Number.isInteger(chunk)) return;
        const plays = !video.paused && Number.isFinite(video.duration);
        window.seen.push([chunk, chunks, video.currentTime, plays]);
    });
}"""

# For every load of a video after the first: where the one before it was left, and where it goes on.
LOADS = """() => {
    window.loads = [];
    const prototype = HTMLMediaElement.prototype;
    const { get, set } = Object.getOwnPropertyDescriptor(prototype, "src");
    let left = 0;
    Object.defineProperty(prototype, "src", {
        get,
        set(value) {
            left ||= this.currentTime;
            set.call(this, value);
        },
    });
    const note = ({ target }) => {
        if (left) window.loads.push([left, target.currentTime]);
        left = 0;
    };
    document.addEventListener("seeked", note, true);
}"""
# Makes the sampler large enough for the text that ComfyUI adds to it.
ROOM = """() => {
    const node = window.app.graph.nodes.find((node) => node.comfyClass === "AutoRefinerSampler");
    if (!node.widgets.some(({ name }) => name === "live")) throw new Error("no room for a video");
    node.setSize([node.size[0], 1400]);
}"""
PAUSED = "(selector) => document.querySelector(selector).paused"
# Whether the workflow is marked as modified, and how many changes can be undone.
MARKS = """() => {
    const { activeWorkflow } = window.app.extensionManager.workflow;
    activeWorkflow.changeTracker.captureCanvasState();
    return [activeWorkflow.isModified, activeWorkflow.changeTracker.undoQueue.length];
}"""


@pytest.fixture(scope="module")
def open_server(weights: Path, tmp_path_factory) -> Iterator[Server]:
    """Start a ComfyUI whose page may play media sources: one with its API nodes."""
    base = tmp_path_factory.mktemp("comfyui_live")
    write_base(base, weights)
    install_pack(base, weights)
    running = Server.start(*find_comfyui(), base, options=())
    yield running
    running.stop()


@pytest.fixture(scope="module", params=["standard", "vue"])
def page(request, open_server: Server) -> Iterator[Page]:
    with opened(open_server, request.param == "vue") as page:
        page.name = request.param
        yield page


def watched(server: Server, **inputs: object) -> Path:
    """Write a workflow whose sampler has a VAE, and which decodes nothing else."""
    graph = small("text_to_video")
    sampler = of_kind(graph, SAMPLER)
    graph = {key: graph[key] for key in sorted(graph, key=int)[: int(sampler)]}
    loader = of_kind(graph, "AutoRefinerLoadDemo")
    graph[sampler]["inputs"] |= {"width": 128, "height": 128, "vae": [loader, 2], **inputs}
    saved = node("SaveLatent", samples=[sampler, 0], filename_prefix="live")
    graph |= {"99": saved | {"_meta": {"title": "Save Latent"}}}
    path = server.base / "live.json"
    path.write_text(json.dumps(to_page(graph, server.get("/object_info"))))
    return path


def begin(page: Page, path: Path) -> None:
    """Open a workflow and queue it."""
    page.errors.clear()
    page.load(path)
    page.look_at(SAMPLER)
    page.queue()


def idle(server: Server, page: Page) -> None:
    while any(server.get("/queue").values()):
        page.tab.wait_for_timeout(100)


def whole(page: Page, seconds: float) -> None:
    """Wait until the page has the whole video."""
    page.until(
        f"(() => {{ const video = document.querySelector('{VIDEO}');"
        f" return video?.loop && video.buffered.length === 1 && video.readyState > 1"
        f" && Math.abs(video.buffered.end(0) - {seconds}) < 0.01"
        f" && Math.abs(video.duration - {seconds}) < 0.01; }})()"
    )


def seek(page: Page, seconds: float) -> None:
    """Pause the video, as its user does, at a time of it."""
    page.until(
        f"""(() => {{
            const video = document.querySelector("{VIDEO}");
            if (video.ended) {{  // it waits for more, and goes on by itself
                video.currentTime = {seconds};
                video.play();
                return false;
            }}
            if (!video.paused) video.pause();
            if (video.currentTime !== {seconds}) video.currentTime = {seconds};
            return video.paused && !video.seeking && video.readyState > 1 && video.videoWidth > 0;
        }})()"""
    )


def stopped(page: Page, server: Server) -> float:
    """Stop the run on the page; return the length of its video, in seconds."""
    page.tab.click(".autorefiner-stop")
    idle(server, page)
    workflow = page.tab.evaluate("() => window.app.graph.id")
    return server.get(f"/autorefiner/live?workflow={workflow}")["videos"][-1]["seconds"]


def serialized(page: Page, server: Server) -> Path:
    """Write the page's workflow, which keeps its id."""
    path = server.base / "reloaded.json"
    path.write_text(json.dumps(page.tab.evaluate("() => window.app.graph.serialize()")))
    return path


def test_the_video_plays_while_later_chunks_are_sampled(page: Page, open_server: Server) -> None:
    page.tab.evaluate(LOG)
    begin(page, watched(open_server, length=161, seed=len(page.name)))
    page.until(f"document.querySelector('{VIDEO}')?.currentTime > 0.5")
    picture(page, "live")
    whole(page, 161 / 16)
    seen = page.tab.evaluate("() => window.seen")
    assert any(2 <= at < count - 1 and time > 0 and on for at, count, time, on in seen)
    line = page.tab.inner_text(LINE)
    assert "10.1 s" in line
    page.until(f"!document.querySelector('{VIDEO}').paused")  # it goes round
    seek(page, 0.25)
    seek(page, 3.5)
    idle(open_server, page)
    picture(page, "live-whole")
    assert page.errors == []


def test_a_run_with_a_video_changes_nothing_of_the_workflow(
    page: Page, open_server: Server
) -> None:
    page.load(watched(open_server, length=21, seed=30 + len(page.name)))
    page.set(SAMPLER, control_after_generate="fixed")
    page.look_at(SAMPLER)
    page.tab.evaluate(ROOM)
    before = page.still(MARKS)
    page.queue()
    whole(page, 21 / 16)
    idle(open_server, page)
    assert page.tab.evaluate(MARKS) == before
    page.set(SAMPLER, length=9)
    page.queue()
    whole(page, 9 / 16)  # of the second run alone
    idle(open_server, page)


def reload(page: Page, path: Path) -> None:
    """Load the page again, and open a workflow."""
    page.tab.reload()
    page.started()
    page.load(path)
    page.look_at(SAMPLER)


def test_a_page_that_is_loaded_again_gets_the_video_so_far_and_the_rest(
    page: Page, open_server: Server
) -> None:
    begin(page, watched(open_server, length=LONG, seed=10 + len(page.name)))
    page.until(f"document.querySelector('{VIDEO}')?.currentTime > 0")
    path = serialized(page, open_server)
    reload(page, path)
    page.until(f"document.querySelector('{VIDEO}')?.currentTime > 0")
    assert open_server.get("/queue")["queue_running"]
    seconds = stopped(page, open_server)
    whole(page, seconds)
    reload(page, path)
    whole(page, seconds)


def test_two_browsers_play_the_same_run(page: Page, open_server: Server) -> None:
    begin(page, watched(open_server, length=69, seed=20 + len(page.name)))
    page.until(f"document.querySelector('{VIDEO}')?.currentTime > 0")
    seek(page, 0.25)
    with another(page, page.tab.url) as other:
        other.load(serialized(page, open_server))
        whole(other, 69 / 16)
        whole(page, 69 / 16)
        paused = [each.tab.evaluate(PAUSED, VIDEO) for each in (page, other)]
        assert paused == [True, False]  # as its user left it
        idle(open_server, page)
        assert "4.3 s" in other.tab.inner_text(LINE) and "4.3 s" in page.tab.inner_text(LINE)


@pytest.fixture
def closed_page(page: Page, server: Server) -> Iterator[Page]:
    """Open ComfyUI with --disable-api-nodes, whose page may play no media sources."""
    for name, value in quiet(page.name == "vue").items():
        set_setting(server, name, value)
    with another(page, f"{LOCAL}{server.port}") as other:
        other.tab.evaluate(LOADS)
        yield other
        idle(server, other)


def test_a_page_that_forbids_media_sources_plays_it_too(closed_page: Page, server: Server) -> None:
    begin(closed_page, watched(server, length=LONG, seed=30 + len(closed_page.name)))
    closed_page.until("window.loads.length > 1")
    whole(closed_page, stopped(closed_page, server))
    loads = closed_page.tab.evaluate("() => window.loads")
    assert all(at > left - 0.01 for left, at in loads)  # it went on where it was
    closed_page.until(f"!document.querySelector('{VIDEO}').paused")
    seek(closed_page, 0.25)


def test_a_page_that_forbids_media_sources_leaves_a_paused_video_paused(
    closed_page: Page, server: Server
) -> None:
    begin(closed_page, watched(server, length=LONG, seed=50 + len(closed_page.name)))
    closed_page.until(f"document.querySelector('{VIDEO}')?.currentTime > 0")
    seek(closed_page, 0.25)
    seconds = closed_page.tab.evaluate(f"() => document.querySelector('{VIDEO}').duration")
    closed_page.until(f"parseFloat(document.querySelector('{LINE}').textContent) > {seconds + 1}")
    whole(closed_page, stopped(closed_page, server))
    assert closed_page.tab.evaluate(PAUSED, VIDEO)
    assert closed_page.tab.evaluate(f"() => document.querySelector('{VIDEO}').currentTime") == 0.25


def test_a_codec_that_the_browser_lacks_is_a_line(page: Page, open_server: Server) -> None:
    page.tab.evaluate("() => { MediaSource.isTypeSupported = () => false; }")
    begin(page, watched(open_server, length=9, seed=40 + len(page.name)))
    page.until(f"document.querySelector('{LINE}')?.textContent.includes('cannot play')")
    assert not page.tab.is_visible(VIDEO)
    idle(open_server, page)
