"""Geometry of a drawn graph: boxes of nodes, lines of links, where they meet, and routes around."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

Point = tuple[float, float]
Route = tuple[Point, ...]
Box = tuple[float, float, float, float]  # left, top, right, bottom
TITLE = 30  # height of a node's title, above its position
SLOTS = {"standard": (14.0, 20.0), "vue": (23.0, 24.0)}  # first slot below the position, and pitch
TURN, CLEAR, SPACE = 36.0, 22.0, 22.0  # of a route: from a node's side, from its edge, to the next
HEADING = 34.0  # height of a group's heading
# What counts against a route, in pixels of length.
UNDER_NODE, CROSSING, ON_HEADING, CORNER, CLOSE = 50000.0, 1500.0, 150.0, 60.0, 600.0
TRIES, MOST_ROUTES = 12, 60


@dataclass(slots=True)
class Line:
    """A link: source and target node, their slots, and the points between."""

    source: int
    output: int
    target: int
    input: int
    via: Route = ()


@dataclass(slots=True)
class Drawing:
    """Boxes of nodes by id, title included, and the links between them."""

    boxes: dict[int, Box]
    lines: list[Line]
    groups: list[Box] = field(default_factory=list)

    def points(self, line: Line, renderer: str) -> list[Point]:
        """Return the corners of a link as a renderer draws its ends."""
        first, pitch = SLOTS[renderer]
        _, top, right, _ = self.boxes[line.source]
        start = (right, top + TITLE + first + pitch * line.output)
        left, top, _, _ = self.boxes[line.target]
        return [start, *line.via, (left, top + TITLE + first + pitch * line.input)]

    def overlaps(self) -> list[tuple[int, int]]:
        """Return the pairs of nodes that lie on top of each other."""
        return [
            (one, other)
            for (one, a), (other, b) in combinations(self.boxes.items(), 2)
            if overlap(a, b)
        ]

    def crossings(self) -> list[tuple[Line, Line]]:
        """Return the pairs of links that cross in either renderer."""
        return [
            (one, other)
            for one, other in combinations(self.lines, 2)
            if any(self.meet(one, other, renderer) for renderer in SLOTS)
        ]

    def meet(self, one: Line, other: Line, renderer: str) -> bool:
        """Whether two links cross; those of one output may share points."""
        if (one.source, one.output) == (other.source, other.output):
            return False
        return meet(self.points(one, renderer), self.points(other, renderer))

    def hidden(self) -> list[tuple[Line, int]]:
        """Return the links that pass under a node in either renderer, each with the node."""
        return [
            (line, node)
            for line in self.lines
            for node, box in self.boxes.items()
            if any(runs_under(self.points(line, renderer), box) for renderer in SLOTS)
        ]

    def outside(self) -> list[int]:
        """Return the nodes that no group surrounds."""
        return [
            node
            for node, box in self.boxes.items()
            if not any(surrounds(group, box) for group in self.groups)
        ]


def drawing_of(page: dict) -> Drawing:
    """Return the geometry of a workflow of the page."""
    boxes = {}
    for node in page["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[node["id"]] = (x, y - TITLE, x + width, y + height)
    reroutes = {each["id"]: each for each in page["extra"].get("reroutes", [])}
    last = {each["id"]: each["parentId"] for each in page["extra"].get("linkExtensions", [])}
    lines = []
    for number, source, output, target, slot, _ in page["links"]:
        points, reroute = [], reroutes.get(last.get(number))
        while reroute is not None:
            points.insert(0, tuple(reroute["pos"]))
            reroute = reroutes.get(reroute.get("parentId"))
        lines.append(Line(source, output, target, slot, tuple(points)))
    groups = [
        (x, y, x + width, y + height)
        for x, y, width, height in (group["bounding"] for group in page["groups"])
    ]
    return Drawing(boxes, lines, groups)


def meet(one: Sequence[Point], other: Sequence[Point]) -> bool:
    """Whether two lines cross, each given by its corners."""
    return any(cross(*a, *b) for a in pairwise(one) for b in pairwise(other))


def runs_under(points: Sequence[Point], box: Box) -> bool:
    """Whether a line runs through the inside of a node's box."""
    left, top, right, bottom = box
    inside = (left + 2, top + 2, right - 2, bottom - 2)
    return any(enters(a, b, inside) for a, b in pairwise(points))


def overlap(a: Box, b: Box) -> bool:
    return all(a[axis] < b[axis + 2] and b[axis] < a[axis + 2] for axis in (0, 1))


def surrounds(outer: Box, inner: Box) -> bool:
    return all(outer[axis] <= inner[axis] and inner[axis + 2] <= outer[axis + 2] for axis in (0, 1))


def side(a: Point, b: Point, point: Point) -> float:
    """Return on which side of the line from a to b a point lies, as a sign."""
    return (b[0] - a[0]) * (point[1] - a[1]) - (b[1] - a[1]) * (point[0] - a[0])


def cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether segment ab and segment cd meet anywhere but at their ends."""
    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def enters(a: Point, b: Point, box: Box) -> bool:
    """Whether a segment has a point inside a box (Liang and Barsky's clipping)."""
    start, end = 0.0, 1.0
    for axis in (0, 1):
        delta = b[axis] - a[axis]
        near, far = box[axis] - a[axis], box[axis + 2] - a[axis]
        if delta == 0:
            if near >= 0 or far <= 0:
                return False
            continue
        near, far = sorted((near / delta, far / delta))
        start, end = max(start, near), min(end, far)
    return start < end


def route(drawing: Drawing) -> None:
    """Choose the routes of all links: clear of nodes, without crossings where there is a way.

    Each link in turn takes the cheapest route beside the others, from several orders of the links.
    """
    lines = drawing.lines
    options = [cheapest(drawing, line) for line in lines]
    best: tuple[float, list[Route]] = (math.inf, [])
    for seed in range(TRIES):
        order = list(range(len(lines)))
        random.Random(seed).shuffle(order)
        for line, routes in zip(lines, options, strict=True):
            line.via = routes[0][1]
        while any([settle(drawing, lines[place], options[place]) for place in order]):
            pass
        total = sum(length(drawing, line) for line in lines)
        total += CROSSING * len(drawing.crossings())
        best = min(best, (total, [line.via for line in lines]), key=lambda each: each[0])
        if not drawing.crossings():
            break
    for line, via in zip(lines, best[1], strict=True):
        line.via = via


def settle(drawing: Drawing, line: Line, routes: list[tuple[float, Route]]) -> bool:
    """Give a link the cheapest of its routes beside the other links; return whether it changed."""
    before, costs = line.via, []
    for alone, line.via in routes:
        costs.append((alone + beside(drawing, line), line.via))
    line.via = min(costs, key=lambda each: each[0])[1]
    return line.via != before


def cheapest(drawing: Drawing, line: Line) -> list[tuple[float, Route]]:
    """Return the best routes of a link with what each costs without the other links."""
    costs = []
    for via in candidates(drawing, line):
        line.via = via
        hidden = sum(
            runs_under(drawing.points(line, renderer), box)
            for box in drawing.boxes.values()
            for renderer in SLOTS
        )
        costs.append((length(drawing, line) + UNDER_NODE * hidden, via))
    return sorted(costs)[:MOST_ROUTES]


def length(drawing: Drawing, line: Line) -> float:
    """Return a link's length in both renderers, with a price for corners and struck headings."""
    total = CORNER * len(line.via)
    headings = [(left, top, right, top + HEADING) for left, top, right, _ in drawing.groups]
    for renderer in SLOTS:
        for a, b in pairwise(drawing.points(line, renderer)):
            total += abs(b[0] - a[0]) + abs(b[1] - a[1])
            total += ON_HEADING * sum(enters(a, b, heading) for heading in headings)
    return total


def beside(drawing: Drawing, line: Line) -> float:
    """Return the price of what a link does to the others: crossings, and lines too close."""
    total = 0.0
    for other in drawing.lines:
        if other is line:
            continue
        total += CROSSING * sum(drawing.meet(line, other, renderer) for renderer in SLOTS)
        total += CLOSE * share_lane(line, other)
    return total


def share_lane(line: Line, other: Line) -> bool:
    """Whether two links of different outputs run level beside each other, too close to tell."""
    if (line.source, line.output) == (other.source, other.output):
        return False
    if len(line.via) != 2 or len(other.via) != 2 or abs(line.via[0][1] - other.via[0][1]) >= SPACE:
        return False
    (start, end), (first, last) = (sorted(x for x, _ in each.via) for each in (line, other))
    return start < last and first < end


def candidates(drawing: Drawing, line: Line) -> Iterator[Route]:
    """Return the routes that a link may take: straight, or level along an edge of some node."""
    yield ()
    _, _, right, _ = drawing.boxes[line.source]
    left, _, _, _ = drawing.boxes[line.target]
    span = (min(right, left) - TURN, max(right, left) + TURN)
    for x, top, far, bottom in (*drawing.boxes.values(), *drawing.groups):
        if far < span[0] or x > span[1]:
            continue
        for place in range(3):
            for y in (top - CLEAR - SPACE * place, bottom + CLEAR + SPACE * place):
                out, into = right + TURN + 8 * place, left - TURN - 8 * place
                yield ((out, y), (into, y))
                yield ((into, y),)
                yield ((out, y),)
