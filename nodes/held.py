"""Finished chunks of earlier runs, held so that a run that begins alike starts after them.

A chunk is held under a key of all that decides its latents: model, size, noise, prompt, and the
chunks before it. A run whose first chunks have held keys commits them to its memory, one pass each,
and samples the rest, with the same result bit for bit.
"""

import hashlib
import itertools
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..refiner.schedule import Chunk
from ..refiner.timeline import Recache, Timeline
from .identity import Identities
from .run import Run

LIMIT = "AUTOREFINER_HELD_MIB"  # environment variable
DEFAULT_MIB = 1024
REMEMBERED = 4096  # keys of dropped chunks


def limit_bytes() -> int:
    """Return the bytes of chunks that may be held: of the environment, else DEFAULT_MIB."""
    text = os.environ.get(LIMIT, "")
    return (int(text) if text.isdecimal() else DEFAULT_MIB) << 20


class HeldChunks:
    """x0 [B, C, F, h, w] of finished chunks by key; beyond `limit` bytes the oldest are dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._chunks: OrderedDict[bytes, Tensor] = OrderedDict()
        self._dropped: deque[bytes] = deque(maxlen=REMEMBERED)

    def __len__(self) -> int:
        return len(self._chunks)

    def first(self, keys: Sequence[bytes]) -> list[Tensor]:
        """Return the chunks of the first keys, up to one that is not held."""
        present = list(itertools.takewhile(self._chunks.__contains__, keys))
        for key in reversed(present):  # a run's first chunk is dropped last
            self._chunks.move_to_end(key)
        return [self._chunks[key] for key in present]

    def has_dropped(self, key: bytes) -> bool:
        """Whether a chunk was held, and dropped for want of room."""
        return key in self._dropped

    def continued(
        self, run: Run, keys: Sequence[bytes]
    ) -> tuple[Run, Callable[[Chunk, Tensor], None]]:
        """Return the run after its held chunks, and the function that holds its finished ones.

        `keys` are those of the run's new chunks, or none.
        """
        given = len(run.plan.given_chunks)

        def hold(chunk: Chunk, x0: Tensor) -> None:
            if keys and chunk.index >= given:
                self.put(keys[chunk.index - given], x0)

        return run.after(self.first(keys)), hold

    def put(self, key: bytes, x0: Tensor) -> None:
        """Hold a chunk."""
        if key in self._chunks or x0.nbytes > self.limit:
            return
        whole = x0.untyped_storage().nbytes() == x0.nbytes
        self._chunks[key] = x0 if whole else x0.clone()
        self.nbytes += x0.nbytes
        while self.nbytes > self.limit:
            oldest, dropped = self._chunks.popitem(last=False)
            self.nbytes -= dropped.nbytes
            self._dropped.append(oldest)


def digest(tensor: Tensor | None) -> str:
    """Return a digest of a tensor's shape, dtype and bytes."""
    if tensor is None:
        return ""
    data = tensor.detach().contiguous().cpu()
    shape = repr((tuple(data.shape), data.dtype)).encode()
    content = data.reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content, digest_size=16, key=shape[:64]).hexdigest()


def chunk_keys(
    run: Run, context: Tensor | Timeline[Tensor], model: Hashable, identities: Identities
) -> list[bytes]:
    """Return the keys of a run's new chunks; none for a method that holds several at once.

    `model` stands for the MODEL and what runs it.
    """
    if not run.plan.chunks or not run.sampler().goes_on:
        return []
    timeline = context if isinstance(context, Timeline) else Timeline.of(context)
    prompts = {scene.start: digest(scene.prompt) for scene in timeline.scenes}
    return list(_chain(_hash(b"", _facts(run, model, identities)), run, timeline, prompts))


def _facts(run: Run, model: Hashable, identities: Identities) -> tuple:
    """Return what every chunk of a run depends on."""
    plan, refined, search = run.plan, run.refined, run.search
    parts: list[Hashable] = [
        model,
        repr(plan.preset),
        repr(plan.policy),
        plan.store.__name__,
        plan.keys,
        (plan.batch, plan.height, plan.width, plan.given),
        digest(run.initial),
        (run.method, run.seed, run.noise_text),
    ]
    if refined:
        parts.append((refined.form, refined.strength, refined.levels, repr(refined.cache)))
    if search:
        parts.append((search.describe(), search.prompt))
    return (*parts, *map(identities.of, run.objects))


def _chain(
    key: bytes, run: Run, timeline: Timeline[Tensor], prompts: dict[int, str]
) -> Iterator[bytes]:
    """Yield each new chunk's key, which follows from the key of the chunk before."""
    for chunk in run.plan.given_chunks:
        key = _hash(key, _scene_at(chunk.start, timeline, prompts))
    for chunk in run.plan.chunks:
        frames = slice(chunk.start, chunk.start + chunk.length)
        clips = [clip for clip in (run.source, run.given_noise) if clip is not None]
        digests = [digest(clip[:, :, frames]) for clip in clips]
        scene = _scene_at(chunk.start, timeline, prompts)
        key = _hash(key, (repr(chunk), run.recipe.take(chunk.index), scene, *digests))
        yield key


def _scene_at(frame: int, timeline: Timeline[Tensor], prompts: dict[int, str]) -> tuple:
    scene = timeline.at(frame)
    transition = scene.transition
    if isinstance(transition, Recache):  # by default of the whole clip, but there is only the past
        transition = replace(transition, frames=min(transition.frames, scene.start))
    return scene.start, prompts[scene.start], repr(transition), repr(scene.cut)


def _hash(key: bytes, facts: tuple) -> bytes:
    return hashlib.blake2b(key + repr(facts).encode(), digest_size=16).digest()
