"""Events of a server, sent to the page that runs without one."""

from collections.abc import Callable

import pytest
from page_browser import Page, find_chromium
from recorded_page import find_frontend


def in_the_page(test: Callable) -> Callable:
    """Mark a test that needs a browser and the frontend package."""
    test = pytest.mark.skipif(find_frontend() is None, reason="no comfyui-frontend-package")(test)
    return pytest.mark.page(
        pytest.mark.skipif(find_chromium() is None, reason="no Chromium, or no playwright")(test)
    )


def status(page: Page, widget: str = "head") -> str:
    return page.tab.inner_text(f".autorefiner-{widget} .autorefiner-status")


def tell(page: Page, event: str, **detail: object) -> None:
    """Send a server event for the node of the strip or of the training."""
    page.tab.evaluate(
        """([event, detail]) => {
            const kind = event === "chunk" ? "AutoRefinerSampler" : "AutoRefinerTrainRefiner";
            const node = String(window.app.graph.nodes.find((node) => node.comfyClass === kind).id);
            const workflow = detail.workflow === "this" ? window.app.graph.id : detail.workflow;
            const full = { ...detail, node, workflow };
            window.app.api.dispatchCustomEvent(`autorefiner.${event}`, full);
        }""",
        [event, detail],
    )


CHUNK = {
    "chunk": 0,
    "chunks": 7,
    "start": 0,
    "end": 9,
    "first": 0,
    "frames": 81,
    "level": 1,
    "levels": 4,
    "elapsed": 2,
    "status": "running",
    "run": 1,
}
