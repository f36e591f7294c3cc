"""What a Reflective Cache will hold and take, for the page to draw before anything is loaded."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..refiner.memory.frames import FrameLedger
from ..refiner.noise.file import KEY, RefinerCard
from ..refiner.schedule import latent_frames, plan_chunks
from ..refiner.wan.checkpoint import CheckpointInfo, inspect
from .api import host
from .chunk_schedule import read_levels
from .load import DTYPES, choose_preset
from .options import HISTORY_MODES, MODELS_OWN, POSITIONS, X0_MODES, ChunkSchedule, ReflectiveCache, preset_for
from .refiner import refiner_path
from .run import ModelFacts, clip_shape, memory_of, plan_run
from .sampler import LONGEST, WIDEST
from .sprites import sprite_file, sprite_preset

MOST = 1 << 20  # of any number of the page
LONGEST_TEXT = 500


def cache_view(asked: object) -> dict[str, Any]:
    """What the last chunk of a clip sees, in latent frames, and the bytes of all keys and values.

    `asked` comes from the page: the cache's widgets, and what it could find out of `model`, `refiner`, `schedule` and
    `size`, each None where it could not. ValueError, in one line, for what cannot be; no model is loaded.
    """
    told = _mapping(asked, "the request")
    cache = ReflectiveCache(
        _number(told, "window", -1), _number(told, "sink", 0), POSITIONS[_choice(told, "positions", tuple(POSITIONS))],
        _choice(told, "history", HISTORY_MODES), _choice(told, "previous_x0", X0_MODES),
    )  # fmt: skip
    facts, size = _facts(told.get("model")), told.get("size")
    if facts is None or size is None:
        return {"missing": "model" if facts is None else "size"}
    card = _card(told.get("refiner"))
    schedule = _schedule(told.get("schedule"))
    preset = preset_for(facts.preset, schedule, cache, refined=card is not None)
    plan = plan_run(preset, _shape(size), None)
    memory = memory_of(plan, facts, card is not None)
    ledger, chunks = FrameLedger(memory), plan_chunks(preset, plan.frames)[1]
    for chunk in chunks[:-1]:
        ledger.commit(chunk.frames)
    last = chunks[-1]
    found = {
        "frames": plan.frames, "chunks": len(chunks), "start": last.start, "end": last.start + last.length,
        "sees": [held.frame for held in ledger.visible(last.length)], "sink": memory.sink_frames,
        "bytes": memory.nbytes, "dtype": str(facts.dtype).removeprefix("torch."),
    }  # fmt: skip
    if card is not None:
        modes = cache.reflected(card.cache)
        found |= {"history": modes.history, "previous": modes.previous}
    return found


def _facts(model: object) -> ModelFacts | None:
    """Of the model that a loader on the page will load."""
    if model is None:
        return None
    told = _mapping(model, "model")
    if told.get("demo") is True:
        return ModelFacts(_info(sprite_file("student"), "auto").config, torch.float32, sprite_preset(), 0)
    weights, dtype = _choice(told, "weights", ("auto", "ema", "raw")), _choice(told, "dtype", DTYPES)
    info = _info(host.find_file("diffusion_models", _text(told, "file")), weights)
    if info.config is None:
        raise ValueError(f"{info.path.name} is no Wan2.1 text-to-video model")
    preset = choose_preset(_text(told, "preset"), info) if told.get("preset") is not None else None
    return ModelFacts(info.config, host.expected_dtype(info, dtype), preset, 0)


def _info(path: Path, weights: str) -> CheckpointInfo:
    return _inspected(path, weights, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _inspected(path: Path, weights: str, changed: int) -> CheckpointInfo:
    return inspect(path, weights=weights)


def _card(refiner: object) -> RefinerCard | None:
    """How a refiner's file says that it was trained."""
    if refiner is None:
        return None
    name = _text(_mapping(refiner, "refiner"), "file")
    path = refiner_path(name)
    info = _info(path, "auto")
    if info.kind != "refiner":
        raise ValueError(f"{name} is no refiner of this pack")
    return RefinerCard.parse(info.metadata.get(KEY, "null"))


def _schedule(schedule: object) -> ChunkSchedule | None:
    if schedule is None:
        return None
    told = _mapping(schedule, "schedule")
    levels, first, refined = read_levels(*(_text(told, name) for name in ("levels", "first_levels", "refined_levels")))
    preset = _text(told, "preset")
    chunk = _number(told, "frames_per_chunk", 0) or None
    return ChunkSchedule(None if preset == MODELS_OWN else preset, levels, chunk, first, refined)


def _shape(size: object) -> tuple[int, int, int, int]:
    told = _mapping(size, "size")
    width, height, length, batch = (_number(told, name, 1) for name in ("width", "height", "length", "batch_size"))
    if max(width, height) > WIDEST or length > LONGEST:
        raise ValueError(f"{width}x{height}, {length} frames: at most {WIDEST}x{WIDEST} and {LONGEST} frames")
    latent_frames(length)
    return clip_shape(None, width, height, length, batch)


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")
    return value


def _number(told: Mapping[str, Any], name: str, least: int) -> int:
    value = told.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise ValueError(f"{name} {str(value)[:40]!r}: give a whole number from {least}")
    return value


def _text(told: Mapping[str, Any], name: str) -> str:
    value = told.get(name)
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} {str(value)[:40]!r} is no name")
    return value


def _choice(told: Mapping[str, Any], name: str, options: tuple[str, ...]) -> str:
    value = told.get(name)
    if value not in options:
        raise ValueError(f"{name} {str(value)[:40]!r} is not one of {', '.join(options)}")
    return value
