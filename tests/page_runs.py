"""Runs of workflows in ComfyUI's page, as the page tests start and await them.

PAGE_PICTURES names a folder for screenshots.
"""

import json
import os
from pathlib import Path

from comfy_graphs import node as graph_node
from comfy_graphs import of_kind, small
from comfy_page import to_page
from comfy_server import Server
from page_browser import FINISHED, STATUS, Page


def picture(page: Page, name: str) -> None:
    """Take a screenshot if PAGE_PICTURES is set."""
    if folder := os.environ.get("PAGE_PICTURES"):
        page.tab.screenshot(path=str(Path(folder) / f"{name}-{page.name}.png"))


def ended(page: Page, how: str) -> None:
    """Wait until the strip shows how the run ended."""
    page.until(f"document.querySelector('{STATUS}')?.textContent.includes('{how}')")


def finished(page: Page, count: int) -> None:
    """Wait until the given number of chunks is shown as finished."""
    page.until(f"document.querySelectorAll('{FINISHED}').length === {count}")


def of_class(graph: dict, kind: str) -> dict:
    """Return the node of a class in a workflow of the page."""
    return next(node for node in graph["nodes"] if node["type"] == kind)


def idle(server: Server, page: Page) -> None:
    """Wait until the queue is empty."""
    while any(server.get("/queue").values()):
        page.tab.wait_for_timeout(100)


def sampled(server: Server, name: str, **inputs: object) -> Path:
    """Write a workflow that samples at 128x128 and saves the latents undecoded, to save time."""
    graph = small("text_to_video")
    sampler = of_kind(graph, "AutoRefinerSampler")
    graph = {key: graph[key] for key in sorted(graph, key=int)[: int(sampler)]}
    graph[sampler]["inputs"] |= {"width": 128, "height": 128, **inputs}
    saved = graph_node("SaveLatent", samples=[sampler, 0], filename_prefix=name)
    return written(server, name, graph | {"99": saved | {"_meta": {"title": "Save Latent"}}})


def written(server: Server, name: str, graph: dict) -> Path:
    """Write a graph in API format as a workflow of the page."""
    path = server.base / f"{name}.json"
    path.write_text(json.dumps(to_page(graph, server.get("/object_info"))))
    return path
