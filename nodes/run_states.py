"""The latest run of each node, as the page shows it, while the server runs: bounded, in memory."""

import itertools
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeAlias

MOST_RUNS = 256
MOST_BYTES = 32 << 20  # of all runs
MOST_PICTURES = 1 << 20  # characters of a run's pictures
MOST_ASKED = 256  # nodes of a request
MOST_NOTICES, LONGEST_NOTICE = 20, 600  # of a node in one prompt; characters
NOTICES = "autorefiner_notices"  # the option of a CONDITIONING that holds notices on its text
OF_CHUNK = ("chunk", "start", "end", "level", "levels", "image", "pictures", "given", "reused")
RUNNING, DONE, STOPPED, INTERRUPTED, FAILED = "running", "done", "stopped", "interrupted", "failed"

Json: TypeAlias = dict[str, object]
Key: TypeAlias = tuple[str, str, str | None]  # ids of workflow, node and client

_numbers = itertools.count(1)


@dataclass(slots=True)
class RunState:
    """A run of a node: facts of the run, and of each of its chunks."""

    node: str
    prompt: str
    workflow: str | None = None
    client: str | None = None  # the page that queued the prompt
    number: int = field(default_factory=lambda: next(_numbers))  # one prompt may run a node twice
    sequence: int = 0  # of the last event
    facts: Json = field(default_factory=lambda: {"status": RUNNING})
    tiles: dict[int, Json] = field(default_factory=dict)  # by a chunk's index
    step: int = 1  # of the chunks that keep their pictures
    sizes: dict[int | None, int] = field(
        default_factory=dict
    )  # bytes by chunk; of facts under None

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def event(self, update: Mapping[str, object]) -> Json:
        """Take in an update; return it as the event for the page."""
        self.sequence += 1
        index = update.get("chunk")
        self.facts |= {name: value for name, value in update.items() if name not in OF_CHUNK}
        self.sizes[None] = len(json.dumps(self.facts))
        if isinstance(index, int):
            self._put(index, {name: update[name] for name in OF_CHUNK if name in update})
        return {**self._origin(), "status": self.facts["status"], **update}

    def as_json(self) -> Json:
        """Return the whole state."""
        tiles = [self.tiles[index] for index in sorted(self.tiles)]
        return {**self._origin(), **self.facts, "tiles": tiles}

    def _origin(self) -> Json:
        return {
            "node": self.node,
            "prompt": self.prompt,
            "workflow": self.workflow,
            "run": self.number,
            "sequence": self.sequence,
        }

    def _put(self, index: int, tile: Json) -> None:
        before = self.tiles.get(index, {})
        if "image" not in tile and "image" in before:
            tile |= {name: before[name] for name in ("image", "pictures")}
        self._set(index, tile)
        while self._pictures() > MOST_PICTURES and self.step <= 2 * len(self.tiles):
            for other in list(self.tiles):
                if other % self.step:
                    self._set(other, without_picture(self.tiles[other]))
            if self._pictures() > MOST_PICTURES:
                self.step *= 2

    def _set(self, index: int, tile: Json) -> None:
        self.tiles[index] = tile
        self.sizes[index] = len(json.dumps(tile))

    def _pictures(self) -> int:
        return sum(len(str(tile.get("image", ""))) for tile in self.tiles.values())


def without_picture(tile: Json) -> Json:
    """Return the state of a chunk without its picture."""
    return {name: value for name, value in tile.items() if name not in ("image", "pictures")}


class RunStates:
    """The latest run by workflow, node and page; beyond the limits the oldest are dropped."""

    def __init__(self, most_runs: int = MOST_RUNS, most_bytes: int = MOST_BYTES) -> None:
        self.most_runs = most_runs
        self.most_bytes = most_bytes
        self._runs: OrderedDict[Key, RunState] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def nbytes(self) -> int:
        return sum(run.nbytes for run in self._runs.values())

    def update(self, run: RunState, update: Mapping[str, object]) -> Json:
        """Take in an update of a run, and return it as the event for the page.

        A run without a workflow, which no page shows again, is not held.
        """
        with self._lock:
            event = run.event(update)
            if run.workflow is not None:
                key = (run.workflow, run.node, run.client)
                self._runs[key] = run
                self._runs.move_to_end(key)
                while len(self) > 1 and (
                    len(self) > self.most_runs or self.nbytes > self.most_bytes
                ):
                    self._runs.popitem(last=False)
            return event

    def find(self, workflow: str, nodes: list[str], client: str | None = None) -> dict[str, Json]:
        """Return the latest runs of a workflow's nodes: those of the page itself, else of any."""
        with self._lock:
            latest: dict[str, RunState] = {}
            for (of_workflow, node, of_client), run in self._runs.items():
                if of_workflow != workflow or node not in nodes:
                    continue
                shown = latest.get(node)
                if shown is None or of_client == client or shown.client != client:
                    latest[node] = run
            return {node: run.as_json() for node, run in latest.items()}

    def answer(self, request: object) -> dict[str, Json]:
        """Answer {"workflow", "nodes", "client"} of a page; ValueError for anything else."""
        asked = request if isinstance(request, dict) else {}
        workflow, nodes, client = (asked.get(name) for name in ("workflow", "nodes", "client"))
        listed = isinstance(nodes, list) and all(isinstance(node, str) for node in nodes)
        if not isinstance(workflow, str) or not listed or len(nodes) > MOST_ASKED:
            raise ValueError(
                'the request is no {"workflow": id, "nodes": [ids]} of at most'
                f" {MOST_ASKED} nodes: reload the page"
            )
        return {"runs": self.find(workflow, nodes, client if isinstance(client, str) else None)}


class NodeTexts:
    """Texts of nodes by (prompt, node): notices, how a run ended, and the text shown last."""

    def __init__(self, most: int = MOST_RUNS) -> None:
        self.most = most
        self._notices: OrderedDict[tuple[str, str], list[str]] = OrderedDict()
        self._endings: dict[tuple[str, str], str] = {}
        self._shown: dict[tuple[str, str], str] = {}

    def show(self, prompt: str, node: str, text: str) -> None:
        """Set the text of a node's new run: a list as an input runs a node several times."""
        self._notices.setdefault((prompt, node), [])
        self._endings.pop((prompt, node), None)
        self._shown[prompt, node] = text
        self._bound()

    def notice(self, prompt: str, node: str, text: str) -> None:
        """Add a notice, each once."""
        notices = self._notices.setdefault((prompt, node), [])
        text = text if len(text) <= LONGEST_NOTICE else text[: LONGEST_NOTICE - 1] + "…"
        if text not in notices and len(notices) < MOST_NOTICES:
            notices.append(text)
        self._bound()

    def end(self, prompt: str, node: str, text: str) -> None:
        """Say how a node's run ended early."""
        self._notices.setdefault((prompt, node), [])
        self._endings[prompt, node] = text
        self._bound()

    def notices(self, prompt: str, node: str) -> list[str]:
        return list(self._notices.get((prompt, node), ()))

    def lines(self, prompt: str, node: str) -> list[str]:
        """Return a node's lines: notices, how it ended if early, and its text."""
        ending, text = (texts.get((prompt, node)) for texts in (self._endings, self._shown))
        planned = f"planned: {text}" if text and ending else text
        return [*self.notices(prompt, node), *filter(None, (ending, planned))]

    def _bound(self) -> None:
        while len(self._notices) > self.most:
            key, _ = self._notices.popitem(last=False)
            self._endings.pop(key, None)
            self._shown.pop(key, None)


def stopped_text(finished: int, chunks: int, frames: int) -> str:
    """Say what came of a run that was stopped early."""
    return f"{finished} of {chunks} chunks, {frames} frames: stopped"
