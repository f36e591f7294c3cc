"""A headless Chromium on the page of a running ComfyUI. Needs playwright (pip) and a Chromium of
the system."""

import importlib.util
import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from comfy_graphs import WORKFLOWS
from comfy_server import Server

NAMES = ("chromium", "chromium-browser", "google-chrome")
HOW = "apt-get install chromium (or set CHROMIUM to one) and pip install -e '.[page]', then pytest -m page"
NODES = "[data-node-id]"  # those of the Vue renderer
STATUS, FINISHED = ".autorefiner-status", ".autorefiner-finished"  # of a strip of chunks
SIZE = (1600, 1000)
SECONDS = 300  # for a slow machine: a wait ends as soon as what it waits for is there
# the pack's modules; before a workflow is loaded, other complaints are the page's own
OWN = "/extensions/autorefiner/"
# The page asks other hosts for releases and for sizes of models, which the server forbids it, and
# the browser here.
FORBIDDEN, REFUSED = "Content Security Policy", "net::ERR_FAILED"
LOCAL = "http://127.0.0.1:"


def find_browser() -> str | None:
    """The path of a Chromium."""
    named = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else []
    return next((path for name in (*named, *NAMES) if (path := shutil.which(name))), None)


def find_chromium() -> str | None:
    """The browser's path, where it and playwright are there."""
    return find_browser() if importlib.util.find_spec("playwright") else None


def touch_files(base: Path) -> None:
    """Empty files by the names that the workflows have: the page looks whether they are there, and
    none is read."""
    folders = {"CLIPLoader": "text_encoders", "AutoRefinerLoadRefiner": "loras"}
    nodes = (
        node for path in WORKFLOWS.glob("*.json") for node in json.loads(path.read_text())["nodes"]
    )
    for node in nodes:
        if folder := folders.get(node["type"]):
            path = base / "models" / folder / node["widgets_values"][0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def set_setting(server: Server, name: str, value: object) -> None:
    """A setting of the page, as its own dialog stores it."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/settings/{name}", json.dumps(value).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    urllib.request.urlopen(request, timeout=120).close()


@dataclass(slots=True)
class Page:
    """A page that is open, and what its console complained of."""

    tab: object  # playwright's Page
    errors: list[str] = field(default_factory=list)
    ready: bool = False
    name: str = ""

    def load(self, workflow: Path) -> None:
        """Open a workflow as a user does."""
        graph = json.loads(workflow.read_text(encoding="utf-8"))
        self.tab.evaluate(
            "([graph, name]) => window.app.loadGraphData(graph, true, true, name)",
            [graph, workflow.stem],
        )
        self.until(
            f"!LiteGraph.vueNodesMode || document.querySelectorAll('{NODES}').length === {len(graph['nodes'])}"
        )
        self.settle()

    def until(self, expression: str) -> None:
        """Wait until an expression of JavaScript holds."""
        self.tab.wait_for_function(f"() => {expression}")

    def settle(self) -> None:
        """Wait until what was changed is drawn."""
        frame = "new Promise((drawn) => requestAnimationFrame(drawn))"
        self.tab.evaluate(f"async () => {{ await {frame}; await {frame}; await {frame}; }}")

    def fit(self) -> None:
        """Look at the whole graph."""
        self.tab.evaluate(
            "() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"
        )
        self.tab.wait_for_timeout(500)  # it moves there
        self.settle()

    def look_at(self, node: str) -> None:
        """Look at the whole of the node of a class, as near as the window lets: what is outside
        cannot be clicked."""
        self.tab.evaluate(
            """(kind) => {
                const canvas = window.app.canvas;
                const node = window.app.graph.nodes.findLast((node) => node.comfyClass === kind);
                const scale = Math.min(1, (window.innerHeight - 200) / node.size[1]);
                canvas.ds.scale = scale;
                canvas.ds.offset[0] = 500 / scale - node.pos[0];
                canvas.ds.offset[1] = 120 / scale - node.pos[1];
                canvas.setDirty(true, true);
            }""",
            node,
        )
        self.settle()

    def boxes(self) -> dict[int, tuple[float, float, float, float]]:
        """Where each node is drawn, by id: left, top, right and bottom in the graph's pixels."""
        found = self.tab.evaluate(
            """() => window.app.graph.nodes.map((node) => {
                const { scale, offset } = window.app.canvas.ds;
                const element = document.querySelector(`[data-node-id="${node.id}"]`);
                if (!element) return [node.id, [...node.boundingRect]];
                const { x, y, width, height } = element.getBoundingClientRect();
                return [node.id, [x / scale - offset[0], y / scale - offset[1], width / scale, height / scale]];
            })"""
        )
        return {node: (x, y, x + width, y + height) for node, (x, y, width, height) in found}

    def queue(self) -> None:
        """Run, as the button does."""
        self.tab.evaluate("() => window.app.queuePrompt(0, 1)")

    def set(self, node: str, **values: object) -> None:
        """Set widgets of the node of a class."""
        self.tab.evaluate(
            """([kind, values]) => {
                const node = window.app.graph.nodes.findLast((node) => node.comfyClass === kind);
                for (const [name, value] of Object.entries(values)) {
                    node.widgets.find((widget) => widget.name === name).value = value;
                }
            }""",
            [node, values],
        )


def quiet(vue: bool) -> dict[str, object]:
    """Settings of the page: its renderer, and nothing that stands before a workflow or draws more
    than it must."""
    return {
        "Comfy.VueNodes.Enabled": vue,
        "Comfy.TutorialCompleted": True,
        "Comfy.InstalledVersion": "1.45.20",
        "Comfy.Workflow.Persist": False,
        "Comfy.NodeBadge.ShowApiPricing": False,
        "Comfy.Minimap.Visible": False,
        "LiteGraph.Canvas.MaximumFps": 20,  # it is drawn by the CPU, which a run needs
    }


@contextmanager
def opened(
    server: Server,
    vue: bool,
    size: tuple[int, int] = SIZE,
    prepare: Callable[[object], None] = lambda tab: None,
) -> Iterator[Page]:
    """The page of a server in the standard renderer, or in that of Vue nodes."""
    for name, value in quiet(vue).items():
        set_setting(server, name, value)
    with browsed(f"{LOCAL}{server.port}", prepare, size) as page:
        yield page


@contextmanager
def browsed(
    address: str, prepare: Callable[[object], None], size: tuple[int, int] = SIZE
) -> Iterator[Page]:
    """The page at an address, which asks no other; `prepare` is given playwright's page before it
    goes there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--mute-audio"]
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=arguments)
        tab = browser.new_page(viewport={"width": size[0], "height": size[1]})
        tab.set_default_timeout(1000 * SECONDS)
        page = Page(tab)
        tab.route(
            lambda asked: not asked.startswith((address, "data:", "blob:")),
            lambda route: route.abort(),
        )
        tab.on("console", lambda message: note(page, message))
        tab.on("pageerror", lambda error: page.errors.append(str(error)))
        prepare(tab)
        tab.goto(address)
        page.until("window.app?.canvas && LiteGraph.registered_node_types.AutoRefinerSampler")
        tab.wait_for_timeout(1500)
        page.ready = True
        try:
            yield page
        finally:
            browser.close()


def complaints(page: Page, workflow: Path) -> list[str]:
    """Open a workflow and look at the whole of it: nodes that are missing or have errors, and what
    the console says."""
    page.errors.clear()
    page.load(workflow)
    page.fit()
    kinds = {node["type"] for node in json.loads(workflow.read_text())["nodes"]}
    known = set(page.tab.evaluate("() => Object.keys(LiteGraph.registered_node_types)"))
    wrong = page.tab.evaluate(
        "() => window.app.graph.nodes.filter((node) => node.has_errors).map((node) => node.type)"
    )
    return [
        *(f"no node {kind}" for kind in sorted(kinds - known)),
        *(f"{kind} has errors" for kind in wrong),
        *page.errors,
    ]


def note(page: Page, message: object) -> None:
    """Keep an error of the console: of the pack's own modules any, of the page those that a
    workflow may cause."""
    address = message.location.get("url", "")
    where = f"{message.text} ({address})"
    elsewhere = FORBIDDEN in where or (REFUSED in where and not address.startswith(LOCAL))
    if message.type == "error" and (OWN in where or (page.ready and not elsewhere)):
        page.errors.append(where)


if (
    __name__ == "__main__"
):  # whether there is a browser, for which playwright is worth its installation
    raise SystemExit(find_browser() is None)
