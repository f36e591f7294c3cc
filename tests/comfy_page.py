"""Convert workflows between API format and the page's, by a running ComfyUI's node definitions.

workflow_pages.py draws the pack's own.
"""

from collections.abc import Iterator

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, GAP = 400, 60  # pixels
HEAD, SOCKET, WIDGET, TEXT = 62, 20, 30, 100  # heights in the taller renderer
SHOWN = {  # of elements that the page adds to nodes
    "AutoRefinerSampler": 150, "AutoRefinerCustomSampler": 130, "AutoRefinerReflectiveCache": 150,
    "AutoRefinerCompareVideos": 270, "AutoRefinerTrainRefiner": 310, "LoadImage": 220,
    "AutoRefinerPromptTimeline": 60,
}  # fmt: skip
SAID = 60  # of what a node says of its run
NOTE = "MarkdownNote"  # a node of the page alone
TELLING = [
    f"AutoRefiner{name}"
    for name in (
        "CompareVideos",
        "CustomSampler",
        "LoadRefiner",
        "PromptTimeline",
        "ReflectiveCache",
        "Sampler",
        "SaveRefiner",
        "ScoreVideo",
        "Search",
        "TrainRefiner",
    )
]


def is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def inputs_of(definition: dict) -> Iterator[tuple[str, str, dict, bool]]:
    """Return (name, type, options, is widget) of a node's inputs in order."""
    for part in ("required", "optional"):
        for name, spec in definition["input"].get(part, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            kind = "COMBO" if isinstance(kind, list) else kind
            yield name, kind, options, kind in WIDGETS and not options.get("forceInput")


def after_widget(name: str, options: dict) -> list[str]:
    """Return the values of widgets that the page itself adds after one."""
    if options.get("control_after_generate"):
        return ["fixed"]
    return ["image"] if options.get("image_upload") else []


def depths(graph: dict) -> dict[str, int]:
    """Return the column of each node: one past the last of its inputs."""
    found: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in found:
            before = [depth(value[0]) for value in graph[key]["inputs"].values() if is_link(value)]
            found[key] = 1 + max(before, default=-1)
        return found[key]

    return {key: depth(key) for key in graph}


def to_page(graph: dict, info: dict) -> dict:
    """Convert a graph in API format to the workflow that the page saves."""
    links, nodes, heights = [], [], {}
    columns = depths(graph)
    for order, key in enumerate(sorted(graph, key=lambda key: (columns[key], int(key)))):
        node, definition = graph[key], info[graph[key]["class_type"]]
        sockets, values = [], []
        for name, kind, options, widget in inputs_of(definition):
            value = node["inputs"].get(name, options.get("default"))
            if widget:
                values += [value, *after_widget(name, options)]
                continue
            if options.get("hidden") and not is_link(value):  # of older workflows
                continue
            sockets.append({"name": name, "type": kind, "link": None})
            if is_link(value):
                given = info[graph[value[0]]["class_type"]]["output"][value[1]]
                links.append(
                    [len(links) + 1, int(value[0]), value[1], int(key), len(sockets) - 1, given]
                )
                sockets[-1]["link"] = len(links)
        outputs = [
            {"name": name, "type": kind, "links": [], "slot_index": slot}
            for slot, (name, kind) in enumerate(
                zip(definition["output_name"], definition["output"], strict=True)
            )
        ]
        tall = any(options.get("multiline") for _, _, options, _ in inputs_of(definition))
        height = (
            HEAD + SOCKET * max(len(sockets), len(outputs)) + WIDGET * len(values) + TEXT * tall
        )
        height += SHOWN.get(node["class_type"], 0) + SAID * (node["class_type"] in TELLING)
        top = heights.get(columns[key], GAP)
        heights[columns[key]] = top + height + GAP
        nodes.append(
            {
                "id": int(key), "type": node["class_type"],
                "pos": [GAP + COLUMN * columns[key], top], "size": [COLUMN - 80, height],
                "flags": {}, "order": order, "mode": 0, "inputs": sockets, "outputs": outputs,
                "title": node["_meta"]["title"],
                "properties": {"Node name for S&R": node["class_type"]}, "widgets_values": values,
            }
        )  # fmt: skip
    by_id = {node["id"]: node for node in nodes}
    for number, source, slot, *_ in links:
        by_id[source]["outputs"][slot]["links"].append(number)
    last = {"last_node_id": max(by_id), "last_link_id": len(links)}
    return {
        **last,
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def to_api(page: dict, info: dict) -> dict:
    """Convert a workflow of the page to the graph that the page queues."""
    ends = {number: [str(source), slot] for number, source, slot, *_ in page["links"]}
    graph = {}
    for node in sorted(page["nodes"], key=lambda node: node["id"]):
        if node["type"] == NOTE:
            continue
        sockets = {
            socket["name"]: ends[socket["link"]] for socket in node["inputs"] if socket["link"]
        }
        values, inputs = list(node["widgets_values"]), {}
        for name, _, options, widget in inputs_of(info[node["type"]]):
            if widget:
                inputs[name] = values.pop(0)
                del values[: len(after_widget(name, options))]
            elif name in sockets:
                inputs[name] = sockets[name]
        assert not values, f"{node['type']} has widget values too many: {values}"
        graph[str(node["id"])] = {
            "inputs": inputs,
            "class_type": node["type"],
            "_meta": {"title": node["title"]},
        }
    return graph
