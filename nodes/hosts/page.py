"""Events that a sampling run sends to the page, and requests that the page sends to the server."""

import asyncio
import base64
import io
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from aiohttp import web
from comfy.model_management import InterruptProcessingException
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...refiner.rollout import Progress
from ...refiner.schedule import Chunk
from ...refiner.terminal import printable
from ..passes import Passes
from ..run import Run
from ..run_states import (
    DONE,
    FAILED,
    INTERRUPTED,
    STOPPED,
    NodeTexts,
    RunState,
    RunStates,
    stopped_text,
)
from .plain import plain_text
from .wire import read_request

if TYPE_CHECKING:
    from server import PromptServer

CHUNK = "autorefiner.chunk"  # the event, which web/strip.js listens to
PICTURES = 4  # frames of a chunk that are shown, at most
SIDE = 128  # pixels of a picture's longer side
SECONDS = 0.25  # between two pictures of one chunk

Answer: TypeAlias = Callable[[object], dict[str, Any]]  # of a request's parsed JSON

_states = RunStates()
_texts = NodeTexts()
_running: dict[str, "Watch"] = {}  # by node id
_stops: dict[str, int] = {}  # stopped runs by node id


class Pictures(Protocol):
    """Draws latent frames [1, C, 1, h, w]."""

    def __call__(self, latent: Tensor) -> Image.Image: ...

    def show(self, progress: Progress, finished: bool) -> None:
        """Go on to this prediction of a chunk; the next calls draw frames of it."""
        ...


@dataclass(slots=True)
class Watch:
    """A run that the page shows."""

    run: Run
    state: RunState
    picture: Pictures
    stopping: bool = False  # after the current chunk
    begun: float = field(default_factory=time.perf_counter)
    shown: float = 0.0
    last: dict = field(default_factory=dict)
    newest: Tensor | None = None  # the last prediction

    @property
    def node(self) -> str:
        return self.state.node

    def begin(self) -> None:
        """Send what is known before the first prediction."""
        plan, run = self.run.plan, self.run
        self.send(
            {
                "chunks": len(plan.given_chunks) + len(plan.chunks),
                "first": pixel_frames(plan.given),
                "frames": pixel_frames(plan.given + plan.frames),
                "length": pixel_frames(run.length or plan.given + plan.frames),
                "seed": run.seed,
                "recipe": str(run.recipe),
                "notices": notices_of(self.state),
            }
        )
        send_text(self.state.prompt, self.node)  # the page dropped that of the run before

    def step(self, progress: Progress, passes: Passes) -> None:
        """Count a prediction; send it when the chunk is finished, else at most every SECONDS."""
        self.newest = progress.x0
        self.last = self.place(progress.chunk) | {
            "chunks": progress.chunks,
            "level": passes.done_of_chunk,
            "levels": passes.needed,
        }
        finished = passes.done_of_chunk == passes.needed
        if finished or time.perf_counter() >= self.shown + SECONDS:
            self.send_last()

    def place(self, chunk: Chunk) -> dict:
        """Return a chunk's index and pixel frames."""
        start, end = (pixel_frames(frame) for frame in (chunk.start, chunk.start + chunk.length))
        return {"chunk": chunk.index, "start": start, "end": end}

    def finished(self, chunk: Chunk, x0: Tensor) -> None:
        """Show a chunk as it is in the clip: given, reused from an earlier run, or sampled."""
        given = len(self.run.plan.given_chunks)
        if chunk.index >= given:
            self.complete(chunk, x0)
            return
        origin = "reused" if chunk.index >= given - self.run.reused else "given"
        self.picture.show(Progress(chunk, None, 0, x0), finished=True)
        tile = self.place(chunk) | {"level": 1, "levels": 1, origin: True}
        self.send(tile | contact(x0, self.picture))

    def complete(self, chunk: Chunk, x0: Tensor) -> None:
        """Show a sampled chunk whose last prediction did not finish it.

        A search chooses another candidate, and repeats that were not needed leave the count short.
        """
        if self.last.get("chunk") != chunk.index:
            return
        whole = self.last["level"] == self.last["levels"]
        if whole and torch.equal(self.newest.float().cpu(), x0):
            return
        self.last["level"], self.newest = self.last["levels"], x0
        self.picture.show(Progress(chunk, None, 0, x0), finished=True)
        self.send_last()

    def send_last(self) -> None:
        """Send the last prediction, with pictures."""
        self.shown = time.perf_counter()
        update = self.last | contact(self.newest, self.picture)
        finished = self.last["level"] == self.last["levels"]
        if finished and "first_picture" not in self.state.facts:
            update["first_picture"] = time.perf_counter() - self.begun
        self.send(update)

    def send(self, update: dict) -> None:
        elapsed = time.perf_counter() - self.begun
        send(CHUNK, self.state, {"elapsed": elapsed, **update})

    def stopped(self) -> bool:
        """Whether to end the run after the chunk that was just finished."""
        if self.stopping and self.last and self.last["chunk"] + 1 < self.last["chunks"]:
            _stops[self.node] = stops(self.node) + 1
            return True
        return False

    def end(self, status: str) -> None:
        """Send how the run ended; the text of a stopped one says what came of it."""
        update: dict = {"status": status, "notices": notices_of(self.state)}
        if status == STOPPED:
            count = (self.last["chunk"] + 1, self.last["chunks"], self.last["end"])
            update["text"] = stopped_text(*count)
            for node in nodes_of(self.state):
                _texts.end(self.state.prompt, node, update["text"])
                send_text(self.state.prompt, node)
        self.send(update)


def pixel_frames(latent: int) -> int:
    """Pixel frames that the first latent frames of a video decode to."""
    return max(0, 4 * latent - 3)


def contact(x0_BCFhw: Tensor, picture: Callable[[Tensor], Image.Image]) -> dict:
    """A few frames of the first video's chunk side by side: a small JPEG in base64."""
    count = min(PICTURES, x0_BCFhw.shape[2])
    chosen = torch.linspace(0, x0_BCFhw.shape[2] - 1, count).round().int().tolist()
    images = [picture(x0_BCFhw[:1, :, index : index + 1]) for index in chosen]
    scale = min(1.0, SIDE / max(images[0].size))
    width, height = (max(1, round(side * scale)) for side in images[0].size)
    sheet = Image.new("RGB", (width * count, height))
    for index, image in enumerate(images):
        sheet.paste(image.convert("RGB").resize((width, height)), (width * index, 0))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=85)
    return {"image": base64.b64encode(data.getvalue()).decode(), "pictures": count}


def page_server() -> "PromptServer | None":
    """Return ComfyUI's running server; None where its nodes run in a script without one."""
    from server import PromptServer

    return getattr(PromptServer, "instance", None)  # set by the first server that is made


def begin_state(node: str, prompt: str) -> RunState:
    """Return the state of a new run of a node, for the page that queued the prompt."""
    server = page_server()
    if server is None:
        return RunState(node, prompt, None, None)
    return RunState(node, prompt, workflow_of(prompt), server.client_id)


def send(event: str, state: RunState, update: dict) -> None:
    """Send an update of a run to the page that queued it, or to all pages, and hold it."""
    server, data = page_server(), _states.update(state, update)
    if server is not None:
        server.send_sync(event, data, state.client)


def workflow_of(prompt: str) -> str | None:
    """The id of a running prompt's workflow, if the page sent it: node ids are not unique."""
    from server import PromptServer

    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    value: object = next((extra for _, key, _, extra, *_ in running if key == prompt), None)
    for name in ("extra_pnginfo", "workflow", "id"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None


def this_run() -> tuple[str | None, str | None]:
    """Ids of the running node and of its prompt; None outside a prompt."""
    context = get_executing_context()
    return (None, None) if context is None else (context.node_id, context.prompt_id)


class NodeText(ui.PreviewText):
    """Text of a node in a prompt, as it is when the node has ended."""

    def __init__(self, prompt: str, node: str, text: str) -> None:
        super().__init__(text)
        self.key = (prompt, node)

    def as_dict(self) -> dict:
        return {"text": (lines_of(*self.key) or plain_text(self.value),)}


def lines_of(prompt: str, node: str) -> str:
    return "\n".join(map(plain_text, _texts.lines(prompt, node)))


def show(text: str) -> ui.PreviewText:
    context = get_executing_context()
    if context is None:
        return ui.PreviewText(plain_text(text))
    _texts.show(context.prompt_id, context.node_id, text)
    send_text(context.prompt_id, context.node_id)
    return NodeText(context.prompt_id, context.node_id, text)


def send_text(prompt: str, node: str) -> None:
    """Show a node's text on the page that queued the prompt."""
    server = page_server()
    if server is not None:
        server.send_progress_text(lines_of(prompt, node), node, server.client_id)


def notice(text: str) -> None:
    logging.warning("AutoRefiner: %s", printable(text))
    context = get_executing_context()
    if context is None:
        return
    _texts.notice(context.prompt_id, context.node_id, plain_text(text))
    send_text(context.prompt_id, context.node_id)


def nodes_of(state: RunState) -> set[str]:
    """Return the node that shows a run and the one that is running."""
    context = get_executing_context()
    return {state.node} if context is None else {state.node, context.node_id}


def notices_of(state: RunState) -> list[str]:
    """Return the notices of the node that shows a run, and of the one that is running."""
    notices = [_texts.notices(state.prompt, node) for node in sorted(nodes_of(state))]
    return list(dict.fromkeys(itertools.chain(*notices)))


@contextmanager
def watching(run: Run, node: str | None, picture: Pictures) -> Iterator[Watch | None]:
    """Show a run on a node of the page (None: the running one); yields None outside a prompt."""
    context = get_executing_context()
    if context is None:
        yield None
        return
    watch = Watch(run, begin_state(node or context.node_id, context.prompt_id), picture)
    _running[watch.node] = watch
    before, status = stops(watch.node), FAILED
    watch.begin()
    try:
        yield watch
        status = DONE if stops(watch.node) == before else STOPPED
    except InterruptProcessingException:
        status = INTERRUPTED
        raise
    finally:
        del _running[watch.node]
        watch.end(status)


def stops(node: str | None) -> int:
    return _stops.get(node or "", 0)


def ask_to_stop(node: object, prompt: object) -> bool:
    """Let a run end after its current chunk; False when no such run is running."""
    watch = _running.get(node) if isinstance(node, str) else None
    if watch is None or watch.state.prompt != prompt:
        return False
    watch.stopping = True
    return True


def add_routes(answers: Mapping[str, Answer]) -> None:
    """Serve /autorefiner/stop, /autorefiner/runs, and /autorefiner/NAME for each answer."""
    from server import PromptServer

    routes = PromptServer.instance.routes
    routes.post("/autorefiner/stop")(answer_stop)
    routes.post("/autorefiner/runs")(partial(answer_with, _states.answer))
    for name, answer in answers.items():
        routes.post(f"/autorefiner/{name}")(partial(answer_with, answer))


async def answer_stop(request: web.Request) -> web.Response:
    """Stop the run of {"node", "prompt"}; 404 where there is none."""
    run = await read_request(request)
    if not isinstance(run, dict) or not ask_to_stop(run.get("node"), run.get("prompt")):
        message = "no such run: give node and prompt of one in the making"
        return web.json_response({"error": message}, status=404)
    return web.json_response({"stopping": True})


async def answer_with(answer: Answer, request: web.Request) -> web.Response:
    """Answer in a thread, as it may read a file; 400 with the message of what `answer` raises."""
    try:
        return web.json_response(await asyncio.to_thread(answer, await read_request(request)))
    except (ValueError, OSError) as error:
        return web.json_response({"error": str(error)}, status=400)
