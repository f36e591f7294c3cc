"""Videos of runs in the making: finished chunks are decoded, encoded and held for the page."""

import queue
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ..refiner.beside import own_stream
from ..refiner.fragments import FragmentEncoder, codec_string, has_h264
from ..refiner.schedule import Chunk
from ..refiner.video import as_bytes
from ..refiner.wan.vae import raw_latents

RATE = 16  # frames a second, Wan's
RUN_BYTES = 64 << 20  # of a run's fragments, at most
MOST_RUNS = 8  # held at once; the oldest goes first
# Encoding as for a file takes three times as long.
QUICK = {"preset": "superfast", "crf": "20"}

# From raw latents [1, 16, f, h, w] of the next chunk to frames [F, H, W, 3] in [0, 1].
Decoder: TypeAlias = Callable[[Tensor], Tensor]
Uninterrupted: TypeAlias = Callable[[], None]  # raises what ends an interrupted run


@dataclass(slots=True)
class LiveVideo:
    """The video of a run so far: an init segment and a fragment for each finished chunk."""

    node: str
    prompt: str
    workflow: str | None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    begun: float = field(default_factory=time.perf_counter)
    init: bytes = b""
    fragments: list[bytes] = field(default_factory=list)
    nbytes: int = 0
    frames: int = 0
    first: float | None = None  # seconds from the beginning to the first fragment
    note: str = ""  # why there is no video, or only the beginning of one
    ended: bool = False

    def append(self, init: bytes, fragment: bytes, frames: int) -> None:
        """Add a chunk's fragment. The page may read at any time, from another thread."""
        self.init = init
        self.frames += frames
        self.nbytes += len(fragment)
        if self.first is None:
            self.first = time.perf_counter() - self.begun
        self.fragments.append(fragment)

    def data(self, start: int = 0, most: int | None = None) -> tuple[bytes, int]:
        """Return fragments from `start` on, at most so many, and the number of the next one.

        Those from 0 on come with the init segment.
        """
        fragments = self.fragments[start:][:most]
        init = self.init if start == 0 and fragments else b""
        return init + b"".join(fragments), start + len(fragments)

    def record(self) -> dict:
        """Describe the video for the page."""
        return {
            "video": self.key,
            "node": self.node,
            "prompt": self.prompt,
            "workflow": self.workflow,
            "fragments": len(self.fragments),
            "codec": codec_string(self.init),
            "seconds": self.frames / RATE,
            "first": self.first,
            "note": self.note,
            "ended": self.ended,
        }


class LiveVideos:
    """The videos of the last runs, by key. The page may ask at any time, from another thread."""

    def __init__(self, most: int = MOST_RUNS) -> None:
        self.most = most
        self.videos: OrderedDict[str, LiveVideo] = OrderedDict()

    def begin(self, node: str, prompt: str, workflow: str | None) -> LiveVideo:
        """Hold a new video; forget the oldest where there are too many."""
        video = LiveVideo(node, prompt, workflow)
        self.videos[video.key] = video
        while len(self.videos) > self.most:
            self.videos.popitem(last=False)
        return video

    def get(self, key: str) -> LiveVideo | None:
        return self.videos.get(key)

    def of_workflow(self, workflow: str) -> list[LiveVideo]:
        """Return the newest video of each node of a workflow."""
        held = list(self.videos.values())
        return list({video.node: video for video in held if video.workflow == workflow}.values())


class Recorder:
    """Decode the chunks of a run's first video into a LiveVideo; an error ends the video only.

    With `room`, chunks are decoded as they finish, beside the sampling, in a worker thread, which
    on a CUDA device has a stream of its own. Without it they wait for the end of the run, which
    unloads other models where it must. `announce` tells the page of every change.
    """

    def __init__(
        self,
        video: LiveVideo,
        open_decoder: Callable[[], Decoder],
        announce: Callable[[LiveVideo], None],
        device: torch.device,
        room: bool = True,
        uninterrupted: Uninterrupted = lambda: None,
        most: int = RUN_BYTES,
    ) -> None:
        self.video, self.open_decoder, self.announce = video, open_decoder, announce
        self.device, self.room, self.uninterrupted = device, room, uninterrupted
        self.most = most
        self.decoder: Decoder | None = None
        self.encoder: FragmentEncoder | None = None
        self.waiting: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()  # None: the end
        self.worker: threading.Thread | None = None
        self.closed = False  # nothing more is decoded

    def __enter__(self) -> "Recorder":
        if not has_h264():
            self._close("no live video: this PyAV has no libx264")
        elif not self.room:
            self._say("the video follows after sampling: its decoder has no room beside the model")
        elif self._open():
            self.worker = threading.Thread(target=self._work, name="live video", daemon=True)
            self.worker.start()
        return self

    def add(self, chunk: Chunk, x0_BCfhw: Tensor) -> None:
        """Take the next finished chunk, normalised [B, C, f, h, w] on the CPU."""
        if self.closed:
            return
        self.waiting.put(raw_latents(x0_BCfhw[:1]))

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.closed = True
            self.waiting.put(None)
            if self.worker is not None:
                self.worker.join()
            self.decoder = self.encoder = None
            self.video.ended = True
            self.announce(self.video)

    def _finish(self) -> None:
        """Wait until all chunks are decoded."""
        self.waiting.put(None)
        if self.worker is not None:
            while self.worker.is_alive():
                self.worker.join(0.05)
                self.uninterrupted()
        elif not self.closed and not self.room and self._open():
            self.video.note = ""
            while (raw := self.waiting.get()) is not None:
                self.uninterrupted()
                self._decode(raw)

    def _work(self) -> None:
        """Decode what is waiting, until the end; the modes and the stream are a thread's own."""
        with torch.inference_mode(), own_stream(self.device):
            while (raw := self.waiting.get()) is not None:
                self._decode(raw)

    def _open(self) -> bool:
        """Open the decoder; False where it cannot be."""
        try:
            self.decoder = self.open_decoder()
        except Exception as error:  # the run goes on
            self._close(f"no live video: {error}")
        return self.decoder is not None

    def _decode(self, raw_1Cfhw: Tensor) -> None:
        """Decode and encode a chunk; an error is a note on the video."""
        if self.closed:
            return
        try:
            frames = as_bytes(self.decoder(raw_1Cfhw))
            if self.encoder is None:
                height, width = frames.shape[1:3]
                self.encoder = FragmentEncoder(width, height, RATE, options=QUICK)
            fragment = self.encoder.encode(frames)
        except Exception as error:  # the run goes on
            self._close(f"the live video ends here: {error}")
            return
        self.video.append(self.encoder.init, fragment, len(frames))
        if self.video.nbytes >= self.most:
            self._close(f"the live video ends here: it is limited to {self.most >> 20} MiB")
        else:
            self.announce(self.video)

    def _close(self, note: str) -> None:
        """Decode nothing more, and say why."""
        self.closed = True
        self._say(note)

    def _say(self, note: str) -> None:
        self.video.note = note
        self.announce(self.video)
