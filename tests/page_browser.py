"""A headless Chromium on the page of a running ComfyUI. Needs playwright (pip) and a Chromium of the system."""

import importlib.util
import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from comfy_server import Server

NAMES = ("chromium", "chromium-browser", "google-chrome")
HOW = "apt-get install chromium (or set CHROMIUM to one) and pip install playwright, then pytest -m page"
SECONDS = 300  # for a slow machine: a wait ends as soon as what it waits for is there
OWN = "/extensions/autorefiner/"  # the pack's modules; before a workflow is loaded, other complaints are the page's own
FORBIDDEN = "Content Security Policy"  # the page asks other hosts for sizes of models, which the server forbids it


def find_chromium() -> str | None:
    """The browser's path, where it and playwright are there."""
    named = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else []
    found = next((path for name in (*named, *NAMES) if (path := shutil.which(name))), None)
    return found if importlib.util.find_spec("playwright") else None


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
            "([graph, name]) => window.app.loadGraphData(graph, true, true, name)", [graph, workflow.stem]
        )
        self.tab.wait_for_timeout(500)

    def fit(self) -> None:
        """Look at the whole graph."""
        self.tab.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.tab.wait_for_timeout(700)

    def look_at(self, node: str) -> None:
        """Look at the node of a class, near enough to read it."""
        self.tab.evaluate(
            """(kind) => {
                const canvas = window.app.canvas;
                const node = window.app.graph.nodes.findLast((node) => node.comfyClass === kind);
                canvas.ds.scale = 1;
                canvas.ds.offset[0] = 500 - node.pos[0];
                canvas.ds.offset[1] = 120 - node.pos[1];
                canvas.setDirty(true, true);
            }""",
            node,
        )
        self.tab.wait_for_timeout(700)

    def queue(self) -> None:
        """Run, as the button does."""
        self.tab.evaluate("() => window.app.queuePrompt(0, 1)")

    def set(self, node: str, **values: object) -> None:
        """Set widgets of the node of a class."""
        self.tab.evaluate(
            """([kind, values]) => {
                const node = window.app.graph.nodes.find((node) => node.comfyClass === kind);
                for (const [name, value] of Object.entries(values)) {
                    node.widgets.find((widget) => widget.name === name).value = value;
                }
            }""",
            [node, values],
        )


@contextmanager
def opened(server: Server, vue: bool, size: tuple[int, int] = (1600, 1000)) -> Iterator[Page]:
    """The page in the standard renderer, or in that of Vue nodes."""
    from playwright.sync_api import sync_playwright

    quiet = {
        "Comfy.VueNodes.Enabled": vue,
        "Comfy.TutorialCompleted": True,
        "Comfy.InstalledVersion": "1.45.20",
        "Comfy.Workflow.Persist": False,
        "Comfy.NodeBadge.ShowApiPricing": False,
    }
    for name, value in quiet.items():
        set_setting(server, name, value)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--mute-audio"]
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=arguments)
        tab = browser.new_page(viewport={"width": size[0], "height": size[1]})
        tab.set_default_timeout(1000 * SECONDS)
        page = Page(tab)
        local = f"http://127.0.0.1:{server.port}"
        tab.route(lambda address: not address.startswith((local, "data:", "blob:")), lambda route: route.abort())
        tab.on("console", lambda message: note(page, message))
        tab.on("pageerror", lambda error: page.errors.append(str(error)))
        tab.goto(local)
        tab.wait_for_function("() => window.app?.canvas && LiteGraph.registered_node_types.AutoRefinerSampler")
        tab.wait_for_timeout(1500)
        page.ready = True
        try:
            yield page
        finally:
            browser.close()


def note(page: Page, message: object) -> None:
    """Keep an error of the console: of the pack's own modules any, of the page those that a workflow may cause."""
    where = f"{message.text} ({message.location.get('url', '')})"
    if message.type == "error" and (OWN in where or (page.ready and FORBIDDEN not in where)):
        page.errors.append(where)
