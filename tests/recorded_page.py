"""The page without ComfyUI: its frontend package alone, with answers that were recorded from the
real server.

python tests/recorded_page.py writes tests/comfy/recorded.json. It needs what the tests of the page
need.
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
ADDRESS = "http://127.0.0.1:8188"  # nothing need listen there
OWN, CACHE = "/extensions/autorefiner/", "/autorefiner/cache"
# What opening a workflow does not need: other templates and translations, folders, and what the
# package itself has.
EMPTY = {
    "/global_subgraphs": {},
    "/i18n": {},
    "/internal/folder_paths": {},
    "/experiment/models": [],
}
LEFT_OUT = ("/assets", "/experiment", "/global_subgraphs", "/i18n", "/internal", "/settings")
PICTURE = PACK / "web" / "docs" / "pictures" / "page.png"  # in the place of any that a node shows


def find_frontend() -> Path | None:
    """The folder that ComfyUI serves its page from, of this environment's package or that of
    ComfyUI's."""
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
    """The classes of nodes that the workflows use."""
    return {node["type"] for path in FILES for node in json.loads(path.read_text())["nodes"]}


def key_of(address: str) -> str:
    """A request as answers are kept by: without the host and the prefix that the page may put
    before a path."""
    parts = urlsplit(address)
    return parts.path.removeprefix("/api") + (f"?{parts.query}" if parts.query else "")


def record(server: Server) -> dict[str, object]:
    """The server's answers in JSON to what the page asks while it opens the workflows; of nodes,
    those they use."""
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
        page.tab.wait_for_timeout(2000)  # nodes look at what they are connected to
    answers = {CACHE: server.post(CACHE, json.loads(posted[-1]))}
    for key in sorted(asked):
        try:
            answers[key] = server.get(key)
        except (HTTPError, ValueError):  # what is not there, or no JSON
            continue
    known, stats = answers["/object_info"], answers["/system_stats"]
    stats["system"]["argv"] = []
    return answers | {
        "/object_info": {kind: known[kind] for kind in sorted(kinds()) if kind in known}
    }


def answers_to(vue: bool) -> dict[str, object]:
    """What was recorded, with the settings of a renderer and the pack's modules as they are now."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    others = [name for name in recorded["/extensions"] if not name.startswith(OWN)]
    own = [OWN + path.name for path in sorted((PACK / "web").glob("*.js"))]
    return recorded | {"/settings": quiet(vue), "/extensions": others + own} | EMPTY


@contextmanager
def replayed(vue: bool) -> Iterator[Page]:
    """The frontend package's page, which no server answers."""
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
            route.fulfill(status=404 if route.request.method == "GET" else 200, json={})

    def prepare(tab: object) -> None:
        tab.route(f"{ADDRESS}/**", answer)
        tab.route_web_socket("**/ws*", lambda socket: None)  # it opens and stays silent

    with browsed(ADDRESS, prepare) as page:
        yield page


def main() -> None:
    """Record anew."""
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
