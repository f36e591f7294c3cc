"""Events that a sampling run sends to the page, and requests that the page sends to the server."""

import asyncio
import base64
import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from aiohttp import web
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...refiner.rollout import Progress
from ...refiner.terminal import printable
from ..passes import Passes
from ..run import Run
from .plain import plain_text
from .wire import read_request

CHUNK = "autorefiner.chunk"  # the event, which web/strip.js listens to
PICTURES = 4  # frames of a chunk that are shown, at most
SIDE = 128  # pixels of a picture's longer side
SECONDS = 0.25  # between two pictures of one chunk

Answer: TypeAlias = Callable[[object], dict[str, Any]]  # of a request's parsed JSON

_running: dict[str, "Watch"] = {}  # by node id
_stops: dict[str, int] = {}  # stopped runs by node id


@dataclass(slots=True)
class Watch:
    """A run that the page shows; `picture` draws a latent frame [1, C, 1, h, w]."""

    run: Run
    node: str
    prompt: str
    picture: Callable[[Tensor], Image.Image]
    stopping: bool = False  # after the current chunk
    begun: float = field(default_factory=time.perf_counter)
    shown: float = 0.0
    last: dict = field(default_factory=dict)
    newest: Tensor | None = None  # the last prediction

    def step(self, progress: Progress, passes: Passes) -> None:
        """Count a prediction; send it when the chunk is finished, else at most every SECONDS."""
        chunk, given = progress.chunk, self.run.plan.given
        self.newest = progress.x0
        self.last = {
            "chunk": chunk.index,
            "chunks": progress.chunks,
            "start": pixel_frames(chunk.start),
            "end": pixel_frames(chunk.start + chunk.length),
            "first": pixel_frames(given),
            "frames": pixel_frames(given + self.run.plan.frames),
            "level": passes.done_of_chunk,
            "levels": passes.needed,
        }
        finished = passes.done_of_chunk == passes.needed
        if finished or time.perf_counter() >= self.shown + SECONDS:
            self.send_last()

    def send_last(self) -> None:
        """Send the last prediction, with pictures."""
        self.shown = time.perf_counter()
        self.send({**self.last, **contact(self.newest, self.picture)})

    def send(self, update: dict) -> None:
        elapsed = time.perf_counter() - self.begun
        send(CHUNK, self.node, self.prompt, {"elapsed": elapsed, **update})

    def stopped(self) -> bool:
        """Whether to end the run after the chunk that was just finished.

        Completes the chunk's count, which repeats that were not needed leave short.
        """
        if self.last and self.last["level"] < self.last["levels"]:
            self.last["level"] = self.last["levels"]
            self.send_last()
        if self.stopping and self.last and self.last["chunk"] + 1 < self.last["chunks"]:
            _stops[self.node] = stops(self.node) + 1
            return True
        return False


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


def send(event: str, node: str, prompt: str, data: dict) -> None:
    """Send an event of a node's run to the page that queued the prompt, or to all pages."""
    from server import PromptServer

    server = PromptServer.instance
    origin = {"node": node, "prompt": prompt, "workflow": workflow_of(prompt)}
    server.send_sync(event, {**origin, **data}, server.client_id)


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


def show(text: str) -> ui.PreviewText:
    from server import PromptServer

    text, context = plain_text(text), get_executing_context()
    if context is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)
    return ui.PreviewText(text)


def notice(text: str) -> None:
    logging.warning("AutoRefiner: %s", printable(text))
    show(text)


@contextmanager
def watching(
    run: Run, node: str | None, picture: Callable[[Tensor], Image.Image]
) -> Iterator[Watch | None]:
    """Show a run on a node of the page (None: the running one); yields None outside a prompt."""
    context = get_executing_context()
    if context is None:
        yield None
        return
    watch = Watch(run, node or context.node_id, context.prompt_id, picture)
    _running[watch.node] = watch
    before, ended = stops(watch.node), "interrupted"
    try:
        yield watch
        ended = "done" if stops(watch.node) == before else "stopped"
    finally:
        del _running[watch.node]
        watch.send({"ended": ended})


def stops(node: str | None) -> int:
    return _stops.get(node or "", 0)


def ask_to_stop(node: object, prompt: object) -> bool:
    """Let a run end after its current chunk; False when no such run is running."""
    watch = _running.get(node) if isinstance(node, str) else None
    if watch is None or watch.prompt != prompt:
        return False
    watch.stopping = True
    return True


def add_routes(answers: Mapping[str, Answer]) -> None:
    """Serve /autorefiner/stop and /autorefiner/NAME for each answer."""
    from server import PromptServer

    routes = PromptServer.instance.routes
    routes.post("/autorefiner/stop")(answer_stop)
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
