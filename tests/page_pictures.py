"""Take the node pictures of the help pages and the README's film in a real ComfyUI.

python tests/page_pictures.py writes web/docs/pictures/NODE.png and docs/run.webp; with --film only
the latter. It needs what the page tests need; the videos come from the bundled models.
"""

import io
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comfy_graphs import WORKFLOWS, small
from comfy_page import NOTE, to_page
from comfy_server import PACK, Server, find_comfyui, install_pack
from demo_files import write_base
from graph_drawing import drawing_of
from page_browser import Page, find_chromium, opened
from PIL import Image

from autorefiner.refiner.demo import bundle

FOLDER = PACK / "web" / "docs" / "pictures"
EDGE, COLOURS, MOST_COLOURS = 8, 64, 160  # pixels around a node; of a picture of one, of many
MARGIN = 90  # around a workflow, in its own pixels: links run there
# Nodes to show of each workflow, after a run or only opened.
RUN = {
    "compare_controls": ("LoadDemo", "LoadRefiner", "DecodeChunks", "CompareVideos"),
    "sampler_custom_advanced": ("CustomSampler",),
    "train_a_refiner": ("TrainRefiner", "SaveRefiner", "Sampler"),
}
OPENED = {
    "self_forcing_refiner": ("LoadARVDM", "ReflectiveCache", "DecodeToVideo"),
    "prompt_timeline": ("PromptTimeline",),
}
ALONE = ("Accelerate", "ChunkSchedule", "LoadReward", "ScoreVideo", "Search")  # not in any workflow
LENGTH, STEPS = 81, 6
SEEN, SCALE = "compare_controls", 0.6  # the picture in docs/comfyui.md
FILMED = PACK / "docs" / "run.webp"
COLUMNS = {60: (1, 2, 3), 430: (4,), 800: (5,), 1170: (8, 6, 7)}  # quickstart's nodes in the film
WINDOW, CLIP = (1360, 900), {"x": 45, "y": 40, "width": 1315, "height": 860}
RUNNING, PLAYED = 60, 27  # most frames of the film while it runs; frames of the finished clips
COLUMN_GAP = 60  # pixels, a title included
MOST_BYTES, QUALITY = 2_000_000, 80  # of the film; of its frames where lossless ones take more
SHOWN_MS, PLAYED_MS, LAST_MS = 160, 190, 1500  # milliseconds a frame


@contextmanager
def server() -> Iterator[Server]:
    """Start a ComfyUI with the pack and its models."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "comfyui"
        base.mkdir()
        write_base(base, bundle.WEIGHTS)
        install_pack(base, bundle.WEIGHTS)
        running = Server.start(*find_comfyui(), base)
        try:
            yield running
        finally:
            running.stop()


def load(page: Page, server: Server, name: str) -> None:
    """Open a workflow at a size that a CPU can sample."""
    graph = small(name)
    for node in graph.values():
        if node["class_type"] == "AutoRefinerSampler":
            node["inputs"]["length"] = LENGTH
        if node["class_type"] == "AutoRefinerTrainRefiner":
            node["inputs"] |= {"steps": STEPS, "length": 21, "preview_every": STEPS}
    path = server.base / f"{name}.json"
    path.write_text(json.dumps(to_page(graph, server.get("/object_info"))))
    page.load(path)


def run(page: Page, server: Server) -> None:
    """Run the open workflow to its end."""
    page.queue()
    page.tab.wait_for_timeout(1000)
    while any(server.get("/queue").values()):
        page.tab.wait_for_timeout(500)
    page.tab.wait_for_timeout(3000)  # videos start to play


def node_box(page: Page, kind: str) -> dict:
    """Return the screen box of the last node of a class."""
    return page.tab.evaluate(
        """([kind, edge]) => {
            const node = window.app.graph.nodes.findLast((node) => node.comfyClass === kind);
            const { scale, offset } = window.app.canvas.ds;
            const [x, y, width, height] = node.boundingRect ?? node.getBounding();
            return {
                x: (x + offset[0]) * scale - edge, y: (y + offset[1]) * scale - edge,
                width: width * scale + 2 * edge, height: height * scale + 2 * edge,
            };
        }""",
        [kind, EDGE],
    )


def keep(picture: bytes, name: str, colours: int = COLOURS) -> None:
    """Write a screenshot as a PNG with few colours."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.png"
    decoded(picture).quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def decoded(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture)).convert("RGB")


def take(page: Page, kinds: tuple[str, ...]) -> None:
    """Take a picture of each node."""
    for kind in (f"AutoRefiner{name}" for name in kinds):
        page.look_at(kind)
        keep(page.tab.screenshot(clip=node_box(page, kind)), kind)


def look_from(
    page: Page, corner: tuple[float, float], scale: float, margin: tuple[int, int] = (80, 90)
) -> None:
    """Show the graph from a corner, at a multiple of the window's own scale."""
    page.tab.evaluate(
        """([[x, y], scale, [left, top]]) => {
            const canvas = window.app.canvas;
            canvas.ds.scale = scale;
            canvas.ds.offset[0] = left / scale - x;
            canvas.ds.offset[1] = top / scale - y;
            canvas.setDirty(true, true);
        }""",
        [corner, scale, margin],
    )
    page.tab.wait_for_timeout(700)


def overview(page: Page, server: Server) -> None:
    """Write the picture of a whole workflow, as it is after a run, for docs/comfyui.md."""
    path = WORKFLOWS / f"{SEEN}.json"
    page.load(path)
    page.tab.evaluate(  # nothing is reused from the run before
        """() => {
            const seeds = window.app.graph.nodes
                .flatMap((node) => node.widgets ?? [])
                .filter((widget) => widget.name === "seed");
            for (const seed of seeds) {
                seed.value = 1;
            }
        }"""
    )
    run(page, server)
    page.tab.wait_for_timeout(6000)  # until the page's notices are gone
    boxes = drawing_of(json.loads(path.read_text())).boxes.values()
    left, top = (min(box[axis] for box in boxes) - MARGIN for axis in (0, 1))
    right, bottom = (max(box[axis] for box in boxes) + MARGIN for axis in (2, 3))
    look_from(page, (left, top), SCALE)
    size = {"width": SCALE * (right - left), "height": SCALE * (bottom - top)}
    keep(page.tab.screenshot(clip={"x": 80, "y": 90, **size}), "page", MOST_COLOURS)


def film(page: Page, server: Server) -> None:
    """Write an animation of quickstart: the samplers at work, then both clips under the slider."""
    path = server.base / "quickstart.json"
    path.write_text(json.dumps(arranged(json.loads((WORKFLOWS / path.name).read_text()))))
    page.load(path)
    look_from(page, (60, 60), 0.72, margin=(70, 165))
    running = [page.tab.screenshot(clip=CLIP)]
    page.queue()
    page.tab.wait_for_timeout(500)
    while any(server.get("/queue").values()):
        running.append(page.tab.screenshot(clip=CLIP))
        page.tab.wait_for_timeout(200)
    page.tab.wait_for_timeout(6000)  # until the page's notices are gone
    played = [played_frame(page, 3 * place) for place in range(PLAYED)]
    frames = [decoded(picture) for picture in (*spread(running, RUNNING), *played)]
    times = [SHOWN_MS] * (len(frames) - PLAYED) + [PLAYED_MS] * (PLAYED - 1) + [LAST_MS]
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    frames[0].save(FILMED, lossless=True, method=3, **options)
    if FILMED.stat().st_size > MOST_BYTES:
        frames[0].save(FILMED, quality=QUALITY, method=4, **options)
    print(f"{FILMED.name}: {FILMED.stat().st_size / 1000:.0f} kB, {len(frames)} frames")


def arranged(graph: dict) -> dict:
    """Return quickstart with the nodes of the film close to each other, and the others far off."""
    graph |= {"groups": [], "extra": {}}
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] != NOTE]
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in graph["nodes"]:
        node["pos"] = [2000 + 400 * node["id"], 60]
    for x, column in COLUMNS.items():
        y = 60
        for number in column:
            nodes[number]["pos"] = [x, y]
            y += nodes[number]["size"][1] + COLUMN_GAP
    return graph


def spread(pictures: list[bytes], count: int) -> list[bytes]:
    """Return up to `count` pictures that differ from their predecessor, evenly spread."""
    changed = [new for old, new in zip([b"", *pictures], pictures, strict=False) if new != old]
    count = min(count, len(changed))
    return [changed[place * (len(changed) - 1) // max(1, count - 1)] for place in range(count)]


def played_frame(page: Page, number: int) -> bytes:
    """Seek both clips of Compare Videos to a frame."""
    page.tab.evaluate(
        """(number) => {
            const place = document.querySelector(".autorefiner-compare input[type=range]");
            place.value = number;
            place.dispatchEvent(new Event("input"));
        }""",
        number,
    )
    page.until(
        "[...document.querySelectorAll('.autorefiner-video')].every((video) => !video.seeking)"
    )
    page.settle()
    return page.tab.screenshot(clip=CLIP)


def take_all(page: Page, running: Server) -> None:
    """Take the pictures of all nodes and of the page."""
    for name, kinds in (RUN | OPENED).items():
        load(page, running, name)
        if name in RUN:
            run(page, running)
        take(page, kinds)
    overview(page, running)
    page.load(WORKFLOWS / "text_to_video.json")
    take_alone(page, ALONE)


def take_alone(page: Page, kinds: tuple[str, ...]) -> None:
    """Take a picture of new nodes, away from all others."""
    for number, kind in enumerate(kinds):
        page.tab.evaluate(
            """([kind, y]) => {
                const node = window.LiteGraph.createNode(kind);
                window.app.graph.add(node);
                node.pos = [5000, y];
            }""",
            [f"AutoRefiner{kind}", 1000 * number],
        )
    take(page, kinds)


def main() -> None:
    """Take all pictures, or only the film."""
    if find_comfyui() is None or find_chromium() is None:
        raise SystemExit("pictures need ComfyUI and Chromium, as the tests of the page do")
    with server() as running:
        if "--film" not in sys.argv[1:]:
            with opened(running, vue=False, size=(1600, 1400)) as page:
                take_all(page, running)
        with opened(running, vue=False, size=WINDOW) as page:
            film(page, running)


if __name__ == "__main__":
    main()
