"""What the page is told of a run while it is made, and what it asks of the server: to stop, and what a cache takes."""

import asyncio
import base64
import io
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
from ..passes import Passes
from ..run import Run
from .plain import plain_text
from .wire import read_request

CHUNK = "autorefiner.chunk"  # the event, which web/strip.js listens to
PICTURES, SIDE = 4, 128  # of a chunk: frames at most, pixels of the longer side
SECONDS = 0.25  # between two pictures of one chunk

Answer: TypeAlias = Callable[[object], dict[str, Any]]  # of a request's parsed JSON

_running: dict[str, "Watch"] = {}  # by the node that makes it
_stops: dict[str, int] = {}  # by node: how many of its runs were stopped


@dataclass(slots=True)
class Watch:
    """A run that the page looks at. `picture` makes an image of one latent frame [1, C, 1, h, w]."""

    run: Run
    node: str
    prompt: str
    picture: Callable[[Tensor], Image.Image]
    asked: bool = False  # to stop after the chunk in the making
    begun: float = field(default_factory=time.perf_counter)
    shown: float = 0.0
    last: dict = field(default_factory=dict)
    newest: Tensor | None = None  # the last prediction

    def step(self, progress: Progress, passes: Passes) -> None:
        """Tell of a prediction; with pictures where the chunk is finished, or some time has passed."""
        chunk, given = progress.chunk, self.run.plan.given
        self.newest = progress.x0
        self.last = {
            "chunk": chunk.index,
            "chunks": progress.chunks,
            "start": pixel_frames(chunk.start),
            "end": pixel_frames(chunk.start + chunk.length),
            "first": pixel_frames(given),
            "frames": pixel_frames(given + self.run.plan.frames),
            "level": passes.made,
            "levels": passes.needed,
        }
        if passes.made == passes.needed or time.perf_counter() >= self.shown + SECONDS:
            self.tell()

    def tell(self) -> None:
        """Tell of the last prediction, with pictures."""
        self.shown = time.perf_counter()
        self.send({**self.last, **contact(self.newest, self.picture)})

    def send(self, told: dict) -> None:
        """An event to the page that queued the prompt."""
        send(CHUNK, self.node, self.prompt, {"elapsed": time.perf_counter() - self.begun, **told})

    def stopped(self) -> bool:
        """Whether the run is to end with the chunk that was just finished, maybe in fewer passes than were counted."""
        if self.last and self.last["level"] < self.last["levels"]:
            self.last["level"] = self.last["levels"]
            self.tell()
        if self.asked and self.last and self.last["chunk"] + 1 < self.last["chunks"]:
            _stops[self.node] = stops(self.node) + 1
            return True
        return False


def pixel_frames(latent: int) -> int:
    """Pixel frames that so many latent frames from the beginning of a video are."""
    return max(0, 4 * latent - 3)


def contact(x0_BCFhw: Tensor, picture: Callable[[Tensor], Image.Image]) -> dict:
    """Frames of a chunk of the first video side by side, as a small JPEG in base64, and how many they are."""
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


def send(event: str, node: str, prompt: str, told: dict) -> None:
    """An event of a node's run to the page that queued the prompt, or to all when none did."""
    from server import PromptServer

    server = PromptServer.instance
    about = {"node": node, "prompt": prompt, "workflow": workflow_of(prompt)}
    server.send_sync(event, {**about, **told}, server.client_id)


def workflow_of(prompt: str) -> str | None:
    """The id of the workflow that a running prompt was made of, where the page told it: others have such nodes too."""
    from server import PromptServer

    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    found: object = next((extra for _, key, _, extra, *_ in running if key == prompt), None)
    for name in ("extra_pnginfo", "workflow", "id"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def this_run() -> tuple[str | None, str | None]:
    """The node that is running and its prompt, where one is."""
    context = get_executing_context()
    return (None, None) if context is None else (context.node_id, context.prompt_id)


def show(text: str) -> ui.PreviewText:
    """A line of plain text on the node that is running."""
    from server import PromptServer

    text, context = plain_text(text), get_executing_context()
    if context is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)
    return ui.PreviewText(text)


@contextmanager
def watching(run: Run, node: str | None, picture: Callable[[Tensor], Image.Image]) -> Iterator[Watch | None]:
    """Tell the page of a run that `node` shows; None outside a prompt, where nobody looks."""
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
    """How many runs of a node were stopped: while it is the same, what the node made may be taken from the cache."""
    return _stops.get(node or "", 0)


def ask_to_stop(node: object, prompt: object) -> bool:
    """Let a run end after the chunk in the making; False when there is none by that node and prompt."""
    watch = _running.get(node) if isinstance(node, str) else None
    if watch is None or watch.prompt != prompt:
        return False
    watch.asked = True
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
    asked = await read_request(request)
    if not isinstance(asked, dict) or not ask_to_stop(asked.get("node"), asked.get("prompt")):
        message = "no such run: give node and prompt of one in the making"
        return web.json_response({"error": message}, status=404)
    return web.json_response({"stopping": True})


async def answer_with(answer: Answer, request: web.Request) -> web.Response:
    """Answer in a thread, as it may read a file; 400 with the message of what `answer` raises."""
    try:
        return web.json_response(await asyncio.to_thread(answer, await read_request(request)))
    except (ValueError, OSError) as error:
        return web.json_response({"error": str(error)}, status=400)
