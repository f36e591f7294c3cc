"""Pictures of the nodes for their help pages and of the page for the README, taken in a real ComfyUI by Chromium.

python tests/page_pictures.py writes web/docs/pictures/NODE.png. It needs what the tests of the page need. The videos in
them are the bundled models'.
"""

import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
from comfy_graphs import WORKFLOWS, small
from comfy_page import to_page
from comfy_server import PACK, Server, find_comfyui, install_pack
from demo_files import write_base
from page_browser import Page, find_chromium, opened

from autorefiner.refiner.demo import bundle

FOLDER = PACK / "web" / "docs" / "pictures"
EDGE, COLOURS = 8, 64  # pixels around a node; of a picture
# Of each workflow the nodes that are shown when it has run, or was only opened.
RUN = {
    "compare_controls": ("LoadDemo", "LoadRefiner", "DecodeChunks", "CompareVideos"),
    "sampler_custom_advanced": ("CustomSampler",),
    "train_a_refiner": ("TrainRefiner", "SaveRefiner", "Sampler"),
}
OPENED = {"self_forcing_refiner": ("LoadARVDM", "ReflectiveCache", "DecodeToVideo")}
ALONE = ("ChunkSchedule", "LoadReward", "ScoreVideo")  # in no workflow
LENGTH, STEPS = 81, 6
SEEN, CORNER, SCALE = "compare_controls", (440, 40), 0.85  # what the README shows, from where in the graph


@contextmanager
def server() -> Iterator[Server]:
    """A ComfyUI with the pack and its models."""
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
    """Open a workflow at a size that a CPU samples."""
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
    """Run what is open to its end."""
    page.queue()
    page.tab.wait_for_timeout(1000)
    while any(server.get("/queue").values()):
        page.tab.wait_for_timeout(500)
    page.tab.wait_for_timeout(3000)  # videos begin to play


def node_box(page: Page, kind: str) -> dict:
    """Where the last node of a class is on the screen."""
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


def keep(picture: bytes, name: str) -> None:
    """Write a screenshot as a PNG of few colours."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with av.open(io.BytesIO(picture)) as container:
        data = png(next(container.decode(video=0)).reformat(format="rgb24"))
    (FOLDER / f"{name}.png").write_bytes(data)
    print(f"{name}.png: {len(data) / 1000:.0f} kB")


def png(frame: av.VideoFrame) -> bytes:
    """A picture with a palette of its own."""
    graph, still = av.filter.Graph(), Fraction(1)
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=still)
    twice, used = graph.add("split"), graph.add("paletteuse", "dither=none")
    palette, sink = graph.add("palettegen", f"max_colors={COLOURS}:reserve_transparent=0"), graph.add("buffersink")
    for one, other, *pads in ((source, twice), (twice, used), (twice, palette, 1), (palette, used, 0, 1), (used, sink)):
        one.link_to(other, *pads)
    graph.configure()
    frame.pts, frame.time_base = 0, still
    graph.push(frame)
    graph.push(None)
    reduced = graph.pull()
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = reduced.width, reduced.height, "pal8", still
    codec.options = {"compression_level": "9", "pred": "none"}
    return b"".join(bytes(packet) for packet in (*codec.encode(reduced), *codec.encode(None)))


def take(page: Page, kinds: tuple[str, ...]) -> None:
    """A picture of each node."""
    for kind in (f"AutoRefiner{name}" for name in kinds):
        page.look_at(kind)
        keep(page.tab.screenshot(clip=node_box(page, kind)), kind)


def overview(page: Page) -> bytes:
    """The part of the graph that the README shows."""
    page.tab.evaluate(
        """([[x, y], scale]) => {
            const canvas = window.app.canvas;
            canvas.ds.scale = scale;
            canvas.ds.offset[0] = 80 / scale - x;
            canvas.ds.offset[1] = 90 / scale - y;
            canvas.setDirty(true, true);
        }""",
        [CORNER, SCALE],
    )
    page.tab.wait_for_timeout(700)
    return page.tab.screenshot(clip={"x": 60, "y": 40, "width": 1400, "height": 860})


def main() -> None:
    """All pictures."""
    if find_comfyui() is None or find_chromium() is None:
        raise SystemExit("pictures need ComfyUI and Chromium, as the tests of the page do")
    with server() as running, opened(running, vue=False, size=(1600, 1400)) as page:
        for name, kinds in (RUN | OPENED).items():
            load(page, running, name)
            if name in RUN:
                run(page, running)
            take(page, kinds)
            if name == SEEN:
                keep(overview(page), "page")
        page.load(WORKFLOWS / "text_to_video.json")
        for kind in ALONE:
            page.tab.evaluate("(kind) => window.app.graph.add(window.LiteGraph.createNode(kind))", f"AutoRefiner{kind}")
        take(page, ALONE)


if __name__ == "__main__":
    main()
