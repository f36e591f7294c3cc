"""Finished chunks that this ComfyUI holds between runs."""

from collections.abc import Callable, Hashable

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...refiner.schedule import Chunk
from ...refiner.timeline import Timeline
from ..held import HeldChunks, chunk_keys, limit_bytes
from ..identity import Identities
from ..run import Run
from .page import notice

HELD = HeldChunks(limit_bytes())
IDENTITIES = Identities()


def identity_of(model: ModelPatcher) -> Hashable:
    """Return what stands for a MODEL: the object that ComfyUI passes on, and its patches."""
    return IDENTITIES.of(model), str(model.patches_uuid), str(model.load_device)


def continued(
    run: Run, context: Tensor | Timeline[Tensor], model: Hashable
) -> tuple[Run, Callable[[Chunk, Tensor], None]]:
    """Return the run after its held chunks, and a function that holds the chunks of it."""
    keys = chunk_keys(run, context, model, IDENTITIES)
    rest, hold = HELD.continued(run, keys)
    if rest.reused < len(keys) and HELD.has_dropped(keys[rest.reused]):
        number = len(rest.plan.given_chunks) + 1
        notice(
            f"chunks from {number} on were dropped from the server's memory of"
            f" {HELD.limit >> 20} MiB and are sampled again"
        )
    return rest, hold
