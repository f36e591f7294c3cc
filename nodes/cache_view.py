"""Answer the page: frames and bytes that a Reflective Cache will hold, before a run."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..refiner.memory.frames import FrameLedger
from ..refiner.memory.stores import get_store
from ..refiner.noise.file import KEY, RefinerCard
from ..refiner.run_plan import RunPlan
from ..refiner.schedule import latent_frames
from ..refiner.wan.checkpoint import CheckpointInfo, inspect
from .api import host
from .cache import chosen_policy
from .chunk_schedule import LEVEL_WIDGETS, read_levels
from .load import DTYPES, choose_preset
from .options import (
    HISTORY_MODES,
    MODELS_OWN,
    X0_MODES,
    CacheOptions,
    ChunkSchedule,
    parse_positions,
    policy_text,
    preset_for,
    store_name,
)
from .refiner import refiner_path
from .run import ModelFacts, clip_shape, memory_of, plan_run
from .sampler import LONGEST, WIDEST
from .sprites import sprite_file, sprite_preset

MOST = 1 << 20  # of any number in a request
LONGEST_TEXT = 500


def cache_view(request: object) -> dict[str, Any]:
    """List the latent frames that the last chunk of a clip sees, and count bytes of all K/V.

    `request` is the page's: the widgets of a Reflective Cache, and `model`, `refiner`, `schedule`
    and `size` as the page found them in the graph, else None. Loads no model. ValueError, in one
    line, for a request that no run could have.
    """
    widgets = _mapping(request, "the request")
    cache = _cache(widgets)
    facts, size = _facts(widgets.get("model")), widgets.get("size")
    if facts is None or size is None:
        return {"missing": "model" if facts is None else "size"}
    card = _card(widgets.get("refiner"))
    schedule = _schedule(widgets.get("schedule"))
    preset = preset_for(facts.preset, schedule, cache, refined=card is not None)
    plan = plan_run(preset, _shape(size), None, cache)
    view = _view(plan, facts, refined=card is not None)
    if card is not None:
        modes = cache.reflected(card.cache)
        view |= {"history": modes.history, "previous": modes.previous}
    return view


def _view(plan: RunPlan, facts: ModelFacts, refined: bool) -> dict[str, Any]:
    memory = memory_of(plan, facts, refined)
    on_device, on_host = memory.bytes_on(facts.device)
    ledger = FrameLedger(memory)
    *earlier, last = plan.chunks
    for chunk in earlier:
        ledger.commit(chunk.frames)
    return {
        "frames": plan.frames,
        "chunks": len(plan.chunks),
        "start": last.start,
        "end": last.start + last.length,
        "sees": [held.frame for held in ledger.visible(last.length)],
        "sink": memory.sink_frames,
        "window": memory.window_frames,
        "positions": plan.preset.positions,
        "memory": policy_text(plan.policy),
        "store": store_name(memory.store),
        "bytes": on_device,
        "host_bytes": on_host,
        "dtype": str(facts.dtype).removeprefix("torch."),
    }


def _cache(widgets: Mapping[str, Any]) -> CacheOptions:
    return CacheOptions(
        window=_number(widgets, "window", -1),
        sink=_number(widgets, "sink", 0),
        positions=parse_positions(
            _text(widgets, "positions"), _text(widgets, "positions_settings")
        ),
        history=_choice(widgets, "history", HISTORY_MODES),
        previous_x0=_choice(widgets, "previous_x0", X0_MODES),
        policy=chosen_policy(_text(widgets, "memory"), _text(widgets, "memory_settings")),
        store=get_store(_text(widgets, "store")),
    )


def _facts(model: object) -> ModelFacts | None:
    """Facts of the model that a loader on the page would load."""
    if model is None:
        return None
    loader = _mapping(model, "model")
    if loader.get("demo") is True:
        config = _info(sprite_file("student"), "auto").config
        return ModelFacts(config, torch.float32, sprite_preset(), 0, device=host.torch_device())
    weights = _choice(loader, "weights", ("auto", "ema", "raw"))
    dtype = _choice(loader, "dtype", DTYPES)
    info = _info(host.find_file("diffusion_models", _text(loader, "file")), weights)
    if info.config is None:
        raise ValueError(f"{info.path.name} is no Wan2.1 text-to-video model")
    preset = None
    if loader.get("preset") is not None:
        preset = choose_preset(_text(loader, "preset"), info)
    expected = host.expected_dtype(info, dtype)
    return ModelFacts(info.config, expected, preset, 0, device=host.torch_device())


def _info(path: Path, weights: str) -> CheckpointInfo:
    return _inspected(path, weights, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _inspected(path: Path, weights: str, modified: int) -> CheckpointInfo:
    return inspect(path, weights=weights)


def _card(refiner: object) -> RefinerCard | None:
    """The card in a refiner's file."""
    if refiner is None:
        return None
    name = _text(_mapping(refiner, "refiner"), "file")
    info = _info(refiner_path(name), "auto")
    if info.kind != "refiner":
        raise ValueError(f"{name} is no refiner of this pack")
    return RefinerCard.parse(info.metadata.get(KEY, "null"))


def _schedule(schedule: object) -> ChunkSchedule | None:
    if schedule is None:
        return None
    widgets = _mapping(schedule, "schedule")
    levels, first_levels, refined = read_levels(*(_text(widgets, name) for name in LEVEL_WIDGETS))
    preset = _text(widgets, "preset")
    chunk = _number(widgets, "frames_per_chunk", 0) or None
    name = None if preset == MODELS_OWN else preset
    return ChunkSchedule(name, levels, chunk, first_levels, refined)


def _shape(size: object) -> tuple[int, int, int, int]:
    widgets = _mapping(size, "size")
    names = ("width", "height", "length", "batch_size")
    width, height, length, batch = (_number(widgets, name, 1) for name in names)
    if max(width, height) > WIDEST or length > LONGEST:
        raise ValueError(
            f"{width}x{height}, {length} frames: at most {WIDEST}x{WIDEST} and {LONGEST} frames"
        )
    latent_frames(length)
    return clip_shape(None, width, height, length, batch)


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")
    return value


def _number(widgets: Mapping[str, Any], name: str, least: int) -> int:
    value = widgets.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise ValueError(f"{name} {str(value)[:40]!r}: give a whole number from {least}")
    return value


def _text(widgets: Mapping[str, Any], name: str) -> str:
    value = widgets.get(name)
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} {str(value)[:40]!r} is no name")
    return value


def _choice(widgets: Mapping[str, Any], name: str, options: tuple[str, ...]) -> str:
    value = widgets.get(name)
    if value not in options:
        raise ValueError(f"{name} {str(value)[:40]!r} is not one of {', '.join(options)}")
    return value
