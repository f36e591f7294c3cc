"""Drive ComfyUI's page in headless Chromium; needs playwright and a system Chromium."""

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
HOW = (
    "apt-get install chromium (or set CHROMIUM to one) and pip install -e '.[page]', "
    "then pytest -m page"
)
NODES = "[data-node-id]"  # nodes of the Vue renderer
STATUS, FINISHED = ".autorefiner-status", ".autorefiner-finished"  # tiles of finished chunks
SIZE = (1600, 1000)
SECONDS = 300  # for a slow machine; waits end early
# the pack's modules; before a workflow is loaded, other complaints are the page's own
OWN = "/extensions/autorefiner/"
# The page asks other hosts for releases and for sizes of models, which the server forbids it, and
# the browser here.
FORBIDDEN, REFUSED = "Content Security Policy", "net::ERR_FAILED"
LOCAL = "http://127.0.0.1:"
STARTED = """window.app?.canvas && LiteGraph.registered_node_types.AutoRefinerSampler
    && !window.app.extensionManager.spinner && window.app.extensionManager.workflow.activeWorkflow
"""


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    named = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else []
    return next((path for name in (*named, *NAMES) if (path := shutil.which(name))), None)


def find_chromium() -> str | None:
    """Return the browser's path if it and playwright are installed, else None."""
    return find_browser() if importlib.util.find_spec("playwright") else None


def touch_files(base: Path) -> None:
    """Create empty files by the workflows' names, as the page checks that they exist."""
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
    """Change a setting of the page as its dialog does."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/settings/{name}", json.dumps(value).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    urllib.request.urlopen(request, timeout=120).close()


@dataclass(slots=True)
class Page:
    """An open page and the errors of its console."""

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
            "!LiteGraph.vueNodesMode || "
            f"document.querySelectorAll('{NODES}').length === {len(graph['nodes'])}"
        )
        self.settle()

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.tab.wait_for_function(f"() => {expression}")

    def started(self) -> None:
        """Wait until the page has opened its first workflow."""
        self.until(STARTED)
        self.tab.wait_for_timeout(1000)  # for errors that come late

    def still(self, expression: str, *given: object) -> object:
        """Return a function's value once it has stayed the same for half a second."""
        before, value = None, self.tab.evaluate(expression, *given)
        while before != value:
            self.tab.wait_for_timeout(500)
            before, value = value, self.tab.evaluate(expression, *given)
        return value

    def settle(self) -> None:
        """Wait until changes are drawn."""
        frame = "new Promise((drawn) => requestAnimationFrame(drawn))"
        self.tab.evaluate(f"async () => {{ await {frame}; await {frame}; await {frame}; }}")

    def fit(self) -> None:
        """Zoom to the whole graph."""
        self.tab.evaluate(
            "() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"
        )
        self.tab.wait_for_timeout(500)  # the view is animated
        self.settle()

    def look_at(self, node: str) -> None:
        """Zoom to the node of a class so that all of it can be clicked."""
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
        """Return each node's left, top, right and bottom in graph pixels, by id."""
        found = self.tab.evaluate(
            """() => window.app.graph.nodes.map((node) => {
                const { scale, offset } = window.app.canvas.ds;
                const element = document.querySelector(`[data-node-id="${node.id}"]`);
                if (!element) return [node.id, [...node.boundingRect]];
                const { x, y, width, height } = element.getBoundingClientRect();
                const corner = [x / scale - offset[0], y / scale - offset[1]];
                return [node.id, [...corner, width / scale, height / scale]];
            })"""
        )
        return {node: (x, y, x + width, y + height) for node, (x, y, width, height) in found}

    def links(self) -> list[tuple[tuple[int, int], list[tuple[float, float]]]]:
        """Return each link's source as (node, output), and its corners in graph pixels."""
        found = self.tab.evaluate(
            """() => [...window.app.graph.links.values()].map((link) => {
                const { graph } = window.app;
                const node = (id) => graph.getNodeById(id);
                const corners = [node(link.target_id).getInputPos(link.target_slot)];
                for (let id = link.parentId; id !== undefined;) {
                    const reroute = graph.reroutes.get(id);
                    corners.unshift(reroute.pos);
                    id = reroute.parentId;
                }
                corners.unshift(node(link.origin_id).getOutputPos(link.origin_slot));
                return [link.origin_id, link.origin_slot, corners.map((corner) => [...corner])];
            })"""
        )
        return [((node, slot), list(map(tuple, corners))) for node, slot, corners in found]

    def queue(self) -> None:
        """Queue the workflow with the page's Run button."""
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
    """Return page settings: the renderer, no dialogs before a workflow, minimal drawing."""
    return {
        "Comfy.VueNodes.Enabled": vue,
        "Comfy.TutorialCompleted": True,
        "Comfy.InstalledVersion": "1.45.20",
        "Comfy.Workflow.Persist": False,
        "Comfy.NodeBadge.ShowApiPricing": False,
        "Comfy.Minimap.Visible": False,
        "LiteGraph.Canvas.MaximumFps": 20,  # drawing takes the CPU from the run
    }


@contextmanager
def opened(
    server: Server,
    vue: bool,
    size: tuple[int, int] = SIZE,
    prepare: Callable[[object], None] = lambda tab: None,
) -> Iterator[Page]:
    """Open a server's page in the standard renderer or in that of Vue nodes."""
    for name, value in quiet(vue).items():
        set_setting(server, name, value)
    with browsed(f"{LOCAL}{server.port}", prepare, size) as page:
        yield page


@contextmanager
def browsed(
    address: str, prepare: Callable[[object], None], size: tuple[int, int] = SIZE
) -> Iterator[Page]:
    """Open a page; `prepare` gets playwright's page before it navigates."""
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
        page.started()
        page.ready = True
        try:
            yield page
        finally:
            browser.close()


@contextmanager
def another(page: Page, address: str) -> Iterator[Page]:
    """Open an address in a second browser."""
    context = page.tab.context.browser.new_context(viewport=page.tab.viewport_size)
    tab = context.new_page()
    tab.set_default_timeout(1000 * SECONDS)
    tab.goto(address)
    second = Page(tab, name=page.name)
    second.started()
    yield second
    context.close()


def complaints(page: Page, workflow: Path) -> list[str]:
    """Open a workflow and return its missing or faulty nodes and the console's errors."""
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
    """Record a console error: any from the pack's modules, from the page those of a workflow."""
    address = message.location.get("url", "")
    where = f"{message.text} ({address})"
    elsewhere = FORBIDDEN in where or (REFUSED in where and not address.startswith(LOCAL))
    if message.type == "error" and (OWN in where or (page.ready and not elsewhere)):
        page.errors.append(where)


if __name__ == "__main__":  # exit status: is there a browser
    raise SystemExit(find_browser() is None)
