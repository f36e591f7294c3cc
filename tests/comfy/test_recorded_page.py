"""The page where ComfyUI is not at hand: every workflow opens in its frontend package, with recorded answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_page import inputs_of
from comfy_server import Server, find_comfyui
from page_browser import Page, complaints, find_chromium
from recorded_page import FILES, RECORDED, find_frontend, kinds, replayed


@pytest.fixture(scope="module", params=["standard", "vue"])
def page(request) -> Iterator[Page]:
    with replayed(request.param == "vue") as page:
        yield page


@pytest.mark.page
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium, or no playwright")
@pytest.mark.skipif(find_frontend() is None, reason="no comfyui-frontend-package")
@pytest.mark.parametrize("workflow", FILES, ids=lambda path: path.stem)
def test_workflows_open_where_no_server_is(workflow: Path, page: Page) -> None:
    assert complaints(page, workflow) == []


@pytest.mark.comfyui
@pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")
def test_what_is_recorded_is_what_the_server_says(server: Server) -> None:
    recorded, now = json.loads(RECORDED.read_text(encoding="utf-8"))["/object_info"], server.get("/object_info")
    assert recorded.keys() == kinds() & now.keys()
    for kind, told in recorded.items():
        for definition in (told, now[kind]):
            definition["sockets"] = [(name, sort, widget) for name, sort, _, widget in inputs_of(definition)]
        for part in ("sockets", "output", "output_name"):
            assert told[part] == now[kind][part], f"{kind} has changed: python tests/recorded_page.py"
