"""The page without ComfyUI: its frontend package, with recorded answers of a real server.

python tests/recorded_page.py writes tests/comfy/recorded.json. It needs what the page tests need.
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from comfy_graphs import WORKFLOWS
from comfy_server import PACK, Server, find_comfyui, install_pack
from demo_files import write_base, write_demo_files
from page_browser import Page, browsed, find_chromium, opened, quiet, touch_files

RECORDED = Path(__file__).with_name("comfy") / "recorded.json"
FILES = sorted(WORKFLOWS.glob("*.json"))
ADDRESS = "http://127.0.0.1:8188"  # nothing has to listen there
OWN, CACHE = "/extensions/autorefiner/", "/autorefiner/cache"
# Not needed to open a workflow: other templates and translations, folders, and the package's own
# files.
EMPTY = {
    "/global_subgraphs": {},
    "/i18n": {},
    "/internal/folder_paths": {},
    "/experiment/models": [],
}
LEFT_OUT = ("/assets", "/experiment", "/global_subgraphs", "/i18n", "/internal", "/settings")
# Replaces every media file that a node shows.
PICTURE = PACK / "web" / "docs" / "pictures" / "page.png"


def find_frontend() -> Path | None:
    """Return the frontend package's folder, from this environment or ComfyUI's."""
    name = "comfyui_frontend_package"
    if (own := importlib.util.find_spec(name)) is not None:
        return Path(own.origin).parent / "static"
    found, places = find_comfyui(), ("lib/python*/site-packages", "Lib/site-packages")
    theirs = (
        path
        for place in places
        if found
        for path in found[1].parent.parent.glob(f"{place}/{name}/static")
    )
    return next(theirs, None)


def kinds() -> set[str]:
    """Return the node classes that the workflows use."""
    return {node["type"] for path in FILES for node in json.loads(path.read_text())["nodes"]}


def key_of(address: str) -> str:
    """Return a request's path and query without the host and the page's optional prefix."""
    parts = urlsplit(address)
    return parts.path.removeprefix("/api") + (f"?{parts.query}" if parts.query else "")


def record(server: Server) -> dict[str, object]:
    """Record the JSON answers that the page gets as it opens the workflows."""
    asked: set[str] = set()
    posted: list[str] = []

    def note(request: object) -> None:
        key = key_of(request.url)
        if (
            request.method == "GET"
            and request.resource_type in ("fetch", "xhr")
            and not key.startswith(LEFT_OUT)
        ):
            asked.add(key)
        if request.method == "POST" and key == CACHE:
            posted.append(request.post_data)

    with opened(server, vue=True, prepare=lambda tab: tab.on("request", note)) as page:
        for path in FILES:
            page.load(path)
        page.tab.wait_for_timeout(2000)  # nodes inspect their inputs
    answers = {CACHE: server.post(CACHE, json.loads(posted[-1]))}
    for key in sorted(asked):
        try:
            answers[key] = server.get(key)
        except (HTTPError, ValueError):  # missing, or no JSON
            continue
    known, stats = answers["/object_info"], answers["/system_stats"]
    stats["system"]["argv"] = []
    return answers | {
        "/object_info": {kind: known[kind] for kind in sorted(kinds()) if kind in known}
    }


def answers_to(vue: bool) -> dict[str, object]:
    """Return the recorded answers with a renderer's settings and the pack's current modules."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    others = [name for name in recorded["/extensions"] if not name.startswith(OWN)]
    own = [OWN + path.name for path in sorted((PACK / "web").glob("*.js"))]
    return recorded | {"/settings": quiet(vue), "/extensions": others + own} | EMPTY


@contextmanager
def replayed(vue: bool) -> Iterator[Page]:
    """Open the frontend package's page with every request answered from the recording."""
    static, answers = find_frontend(), answers_to(vue)

    def answer(route: object) -> None:
        key = key_of(route.request.url)
        path = key.split("?")[0]
        file = (
            PACK / "web" / path.removeprefix(OWN)
            if path.startswith(OWN)
            else static / path.lstrip("/")
        )
        if key in answers:
            route.fulfill(json=answers[key])
        elif path == "/view":
            route.fulfill(path=PICTURE)
        elif path == "/":
            route.fulfill(path=static / "index.html")
        elif file.is_file():
            route.fulfill(path=file)
        else:
            missing = route.request.method == "GET" and not path.startswith("/autorefiner/")
            route.fulfill(status=404 if missing else 200, json={})

    def prepare(tab: object) -> None:
        tab.route(f"{ADDRESS}/**", answer)
        tab.route_web_socket("**/ws*", lambda socket: None)  # it opens and stays silent

    with browsed(ADDRESS, prepare) as page:
        yield page


def main() -> None:
    """Record the answers anew."""
    if find_comfyui() is None or find_chromium() is None:
        raise SystemExit("recording needs ComfyUI and Chromium, as the tests of the page do")
    with tempfile.TemporaryDirectory() as folder:
        weights, base = write_demo_files(Path(folder) / "weights"), Path(folder) / "comfyui"
        base.mkdir()
        write_base(base, weights)
        install_pack(base, weights)
        touch_files(base)
        server = Server.start(*find_comfyui(), base)
        try:
            text = json.dumps(record(server), ensure_ascii=False, indent=1)
        finally:
            server.stop()
    RECORDED.write_text(text + "\n", encoding="utf-8")
    print(f"{RECORDED.name}: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
