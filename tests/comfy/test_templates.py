"""The workflows as templates of a real ComfyUI: listed with pictures, and offering their models."""

import io
import json
import urllib.request

import pytest
from comfy_graphs import NAMES, WORKFLOWS
from comfy_server import Server, find_comfyui
from page_browser import find_chromium, opened
from PIL import Image
from published_urls import URLS
from thumbnails import SIZE

pytestmark = pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")
FILE = "krea-realtime-video-14b.safetensors"


@pytest.mark.comfyui
def test_the_server_lists_the_workflows_with_their_pictures(server: Server) -> None:
    assert sorted(server.get("/workflow_templates")["autorefiner"]) == NAMES
    for name in NAMES:
        address = f"http://127.0.0.1:{server.port}/api/workflow_templates/autorefiner/{name}"
        with urllib.request.urlopen(f"{address}.jpg", timeout=60) as answer:
            assert Image.open(io.BytesIO(answer.read())).size == SIZE
        with urllib.request.urlopen(f"{address}.json", timeout=60) as answer:
            assert json.loads(answer.read())["groups"]


@pytest.mark.page
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium")
def test_the_page_offers_a_model_that_is_missing(server: Server) -> None:
    path = server.base / "models" / "diffusion_models" / FILE
    hidden = path.rename(path.with_suffix(".hidden"))
    try:
        with opened(server, vue=False) as page:
            page.load(WORKFLOWS / "krea_14b.json")
            page.tab.get_by_text("Show missing models").click()
            page.tab.get_by_text(FILE).first.wait_for()
            page.tab.get_by_role("button", name="Download").first.wait_for()
            missing = page.tab.evaluate(
                """() => window.app.graph.nodes.flatMap((node) => node.properties.models ?? [])"""
            )
    finally:
        hidden.rename(path)
    assert {model["name"]: model["url"] for model in missing}[FILE] == URLS[FILE]
