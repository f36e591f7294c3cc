"""Draw the pack's workflows: workflows/api/NAME.json and its layout become workflows/NAME.json.

Writes the blueprint of subgraphs/ as well.

`make workflows`, or `python tests/workflow_pages.py NAME ...`; needs ComfyUI and Chromium, as nodes
get the sizes that the page gives them, the larger of both renderers.
"""

import json
import re
import sys
from collections.abc import Iterable

import blueprints
from comfy_graphs import API, NAMES, WORKFLOWS
from comfy_page import NOTE, to_page
from comfy_server import PACK, Server, find_comfyui
from graph_drawing import TITLE, Box, Drawing, Line, drawing_of, route
from page_browser import Page, find_chromium, opened
from page_pictures import server
from published_urls import models_of
from workflow_layouts import COLOURS, LAYOUTS, Layout

Size = tuple[float, float]
WIDTH, NARROW = 270, 240  # of a node, of one without widgets that need room
WIDTHS = {
    "AutoRefinerSampler": 320, "AutoRefinerCustomSampler": 320, "AutoRefinerTrainRefiner": 360,
    "AutoRefinerReflectiveCache": 300, "AutoRefinerCompareVideos": 340, "SaveVideo": 300,
    "AutoRefinerDecodeToVideo": 320, "CLIPTextEncode": 300, "AutoRefinerPromptTimeline": 340,
    "AutoRefinerDecodeChunks": NARROW, "CreateVideo": NARROW, "VAEEncode": NARROW,
}  # fmt: skip
ROOM = {  # for what a run adds: videos; and for what is typed
    "SaveVideo": 280, "AutoRefinerDecodeToVideo": 280, "CLIPTextEncode": 90,
    "AutoRefinerPromptTimeline": 150, "AutoRefinerCompareVideos": 150,
}  # fmt: skip
NODE_GAP, COLUMN_GAP, GROUP_GAP = 40, 74, 110  # pixels
BORDER, HEADING = 20, 48  # of a group, around its nodes and above them
NOTE_LINE, NOTE_LETTERS, NOTE_HEIGHT = 21, 40, 70  # of a note's text, and besides it
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}


def repository() -> str:
    """Return the address of the repository from pyproject.toml."""
    text = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'Repository = "(.*)"', text)[1]


def measured(page: Page, server: Server, graph: dict) -> dict[int, float]:
    """Return the least height of each node of a workflow, without its title."""
    path = server.base / "measured.json"
    path.write_text(json.dumps(graph))
    page.load(path)
    page.tab.wait_for_timeout(300)
    return {
        int(node): height
        for node, height in page.tab.evaluate(
            """(title) => window.app.graph.nodes.map((node) => {
                const element = document.querySelector(`[data-node-id="${node.id}"]`);
                const { scale } = window.app.canvas.ds;
                const drawn = element ? element.getBoundingClientRect().height / scale - title : 0;
                return [node.id, Math.max(node.computeSize()[1], drawn)];
            })""",
            TITLE,
        )
    }


def heights(server: Server, graphs: dict[str, dict]) -> dict[str, list[dict[int, float]]]:
    """Return the least heights of the nodes of each workflow in both renderers."""
    result: dict[str, list[dict[int, float]]] = {name: [] for name in graphs}
    for vue in (False, True):
        with opened(server, vue) as page:
            for name, graph in graphs.items():
                for node in graph["nodes"]:
                    node["size"] = [WIDTHS.get(node["type"], WIDTH), 10]
                result[name].append(measured(page, server, graph))
    return result


def sizes(graph: dict, heights: Iterable[dict[int, float]]) -> dict[int, Size]:
    """Return the size of each node that fits in every renderer, with room for what runs add."""
    result = {}
    for node in graph["nodes"]:
        kind = node["type"]
        room = ROOM.get(kind, 0)
        height = max(least[node["id"]] for least in heights) + room
        result[node["id"]] = (WIDTHS.get(kind, WIDTH), 10 * round(height / 10 + 0.5))
    return result


def placed(layout: Layout, sizes: dict[int, Size]) -> tuple[dict[int, Box], dict[str, Box]]:
    """Return the boxes of the nodes, titles included, and those of the groups."""
    boxes, groups, x = {}, {}, 0.0
    for name, columns in layout.groups.items():
        top = 0.0
        if layout.stacked and name == "prompt":
            x, top = 0.0, groups["load"][3] + BORDER + HEADING
        start = x
        for column in columns:
            y, width = top, max(sizes[node][0] for node in column)
            for node in column:
                height = TITLE + sizes[node][1]
                boxes[node] = (x, y, x + width, y + height)
                y += height + NODE_GAP
            x += width + COLUMN_GAP
        inner = [boxes[node] for column in columns for node in column]
        bottom = max(box[3] for box in inner)
        right = max(box[2] for box in inner)
        groups[name] = (start - BORDER, top - HEADING, right + BORDER, bottom + BORDER)
        x = max(box[2] for box in boxes.values()) + GROUP_GAP
    return boxes, groups


def note_text(layout: Layout) -> str:
    """Return the note in Markdown."""
    return f"{layout.note}\n\n[Help: {layout.help}]({repository()}/blob/main/{layout.help})"


def note_node(layout: Layout, number: int, under: Box) -> tuple[dict, Box]:
    """Return the node of the note and its box, below a group."""
    left, right, top = under[0] + BORDER, under[2] - BORDER, under[3] + BORDER
    lines = len(layout.note) / (NOTE_LETTERS * (right - left) / WIDTH) + 3
    height = 10 * round((NOTE_HEIGHT + NOTE_LINE * lines) / 10)
    node = {
        "id": number, "type": NOTE, "pos": [left, top + TITLE],
        "size": [right - left, height], "flags": {}, "order": 0, "mode": 0, "inputs": [],
        "outputs": [], "title": "About this workflow", "properties": {},
        "widgets_values": [note_text(layout)], **NOTE_COLOURS,
    }  # fmt: skip
    return node, (left, top, right, top + TITLE + height)


def reroutes(page: dict, drawing: Drawing) -> dict:
    """Return the routes of the links as the page saves them."""
    points, ends = [], []
    for (number, *_), line in zip(page["links"], drawing.lines, strict=True):
        parent = None
        for point in line.via:
            each = {"id": len(points) + 1, "pos": list(point), "linkIds": [number]}
            points.append(each | ({"parentId": parent} if parent else {}))
            parent = len(points)
        if parent:
            ends.append({"id": number, "parentId": parent})
    return {"reroutes": points, "linkExtensions": ends} if points else {}


def drawn(page: dict, layout: Layout, sizes: dict[int, Size]) -> dict:
    """Place the nodes of a workflow, and add its note, groups and routes."""
    boxes, groups = placed(layout, sizes)
    for node in page["nodes"]:
        left, top, right, bottom = boxes[node["id"]]
        node["pos"] = [left, top + TITLE]
        node["size"] = [right - left, bottom - top - TITLE]
        if models := models_of(node):
            node["properties"]["models"] = models
    above = groups["prompt" if layout.stacked else "load"]
    note, box = note_node(layout, page["last_node_id"] + 1, above)
    page["nodes"].append(note)
    page["last_node_id"] += 1
    lines = [
        Line(source, output, target, slot) for _, source, output, target, slot, _ in page["links"]
    ]
    drawing = Drawing(boxes | {note["id"]: box}, lines, list(groups.values()))
    route(drawing)
    page["extra"] = reroutes(page, drawing)
    page["groups"] = [
        {
            "id": number, "title": name.capitalize(), "color": COLOURS[name], "font_size": 24,
            "bounding": [left, top, right - left, bottom - top], "flags": {},
        }
        for number, (name, (left, top, right, bottom)) in enumerate(groups.items(), 1)
    ]  # fmt: skip
    return page


def describe(name: str, drawing: Drawing) -> str:
    """Describe a drawing in one line."""
    left, top, right, bottom = (
        pick(box[side] for box in drawing.boxes.values())
        for side, pick in enumerate((min, min, max, max))
    )
    return (
        f"{name}: {right - left:.0f}x{bottom - top:.0f}, {len(drawing.crossings())} crossings, "
        f"{len(drawing.hidden())} links under nodes"
    )


def main() -> None:
    """Draw the workflows that are named, or all."""
    if find_comfyui() is None or find_chromium() is None:
        raise SystemExit("drawing workflows needs ComfyUI and Chromium, as the page's tests do")
    graphs = {
        name: json.loads((API / f"{name}.json").read_text()) for name in sys.argv[1:] or NAMES
    }
    with server() as running:
        info = running.get("/object_info")
        least = heights(running, {name: to_page(graph, info) for name, graph in graphs.items()})
    for name, graph in graphs.items():
        page = to_page(graph, info)
        page = drawn(page, LAYOUTS[name], sizes(page, least[name]))
        text = json.dumps(page, indent=1, ensure_ascii=False)
        (WORKFLOWS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(describe(name, drawing_of(page)), flush=True)
    blueprints.write(info)


if __name__ == "__main__":
    main()
